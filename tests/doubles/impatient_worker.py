"""What is a worker that suspects a silent broker at once? `celery -A tests.doubles.impatient_worker worker`, set up like ours."""

from ollm_service.settings import Settings
from workers.app import make_worker

app = make_worker(Settings.load(), silent_seconds=0.0)
