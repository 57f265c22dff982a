"""What is told of a try's memory?"""

from typing import Any

import pytest

from ollm_service.cli.plans import memory_in_words
from ollm_service.client import Attempt
from ollm_service.core.estimates import MemoryEstimate
from ollm_service.core.wire import to_json

MIB = 1024**2
ESTIMATE = to_json(
    MemoryEstimate(weights=400 * MIB, kv=40 * MIB, activations=80 * MIB, logits=0, workspace=46 * MIB, disk=9 * MIB)
)


@pytest.mark.parametrize(
    ("estimate", "measured", "told"),
    [
        (ESTIMATE, {"peak_device_bytes": float(543 * MIB)}, "566 MiB estimated, 543 MiB at the most"),
        (ESTIMATE, {}, "566 MiB estimated"),
        ({}, {"peak_device_bytes": 2048}, "2.0 KiB at the most"),
        ({}, {}, ""),
    ],
)
def test_the_measured_peak_stands_beside_the_estimate(estimate: dict[str, Any], measured: dict[str, Any], told: str) -> None:
    """Both are of the device's memory, so that they can be compared; what lies on the disk is in neither."""
    attempt = Attempt(
        number=1,
        worker="wkr_1",
        node="here",
        outcome="succeeded",
        runtime_plan=None,
        placement={},
        estimate=estimate,
        measured=measured,
    )
    assert memory_in_words(attempt) == told
