"""Who runs the plans? The Celery worker, its torch-free agent, and the runners that hold the models."""
