"""Which labels of an operator are numbers?"""

from pathlib import Path

from ollm_service.core.wire import to_json
from ollm_service.settings import Settings


def test_only_plain_numbers_are_numbers() -> None:
    """What looks like one only to Python stays a text, so that it can be compared and stored."""
    labels = Settings.load(
        worker_labels="rack=2, height=-1.5,zone=inf,name=nan,build=1_000,size=1e5", data_dir=Path("data")
    ).labels
    assert labels == {"rack": 2.0, "height": -1.5, "zone": "inf", "name": "nan", "build": "1_000", "size": "1e5"}
    assert to_json(labels) == labels
