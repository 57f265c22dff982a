"""Does a runner notice that its process can use a CUDA device no more? In a process of its own, which is spoilt by that."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os
import torch
from workers.runner.engine import Engine
engine = Engine()
print(engine.has_lost("cuda:0"))
torch._assert_async(torch.zeros(1, device="cuda:0"))
print(engine.has_lost("cuda:0"), flush=True)
os._exit(0)
"""


@pytest.mark.usefixtures("device")
def test_a_failed_assertion_on_the_device_loses_it() -> None:
    """Before it the device can be used; after it nothing can be computed there, and the engine says so."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
