"""What do the tests on a GPU share? The device, and small models. Nothing here needs more than the runner does."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.runner.models import save_model

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first CUDA device; without one a test is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small model of a family in float32, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def family(name: str) -> Path:
        if name not in made:
            made[name] = save_model(root / name, name)
        return made[name]

    return family
