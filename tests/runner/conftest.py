"""What do the runner's tests share? An engine that stays warm, and small models on disk."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.runner.models import save_model
from workers.runner.engine import Engine

# The models are so small that a second thread costs more than it gives.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def engine() -> Engine:
    """One engine for many tests, as one runner serves many plans. It reports every answer at once."""
    return Engine(report_seconds=0.0)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small model of each family, and a llama without a chat template."""
    root = tmp_path_factory.mktemp("models")
    folders = {family: save_model(root / family, family) for family in ("llama", "qwen2", "gpt2")}
    folders["llama-without-template"] = save_model(root / "no-template", "llama", seed=1, has_chat_template=False)
    return folders


@pytest.fixture
def llama(model_dirs: dict[str, Path]) -> Path:
    """The small llama."""
    return model_dirs["llama"]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small model of a family, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("families"), dict[str, Path]()

    def family(name: str) -> Path:
        if name not in made:
            made[name] = save_model(root / name, name)
        return made[name]

    return family


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB, where this process may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
