"""Does the code stand where the design says: imports inwards, a pure core, no cycles, torch in the runner only, few settings?"""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

from ollm_service.settings import Settings
from scripts.write_settings_page import PAGE, page

ROOT = Path(__file__).parents[2]
PACKAGES = ("ollm_service", "workers")
# What a worker may lack, and the one module that uses it, which is imported where a plan needs it.
OPTIONAL_LIBRARIES = {"adapters.py": {"peft"}, "images.py": {"PIL"}}
MODEL_LIBRARIES = ("accelerate", "torch", "transformers", "safetensors")
# What a client reads, and where settings are; everything else that starts with OLLM_ is a field of Settings.
OTHER_VARIABLES = {"OLLM_BASE_URL", "OLLM_API_KEY", "OLLM_CONFIG_FILE"}
MOST_SETTINGS = 24


def source_files(*folders: str) -> list[Path]:
    """Every Python file below the named folders of the project."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_roots(path: Path) -> set[str]:
    """The top-level names of every module that a file imports, anywhere in it."""
    roots: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            roots.add(node.module.partition(".")[0])
    return roots


def test_every_import_contract_is_kept() -> None:
    """The import contracts of pyproject.toml hold."""
    # As a program: in this process it would silence every logger.
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", source_files("ollm_service/core"), ids=lambda path: path.name)
def test_core_imports_the_standard_library_only(path: Path) -> None:
    """A file of the core imports the standard library and the core, nothing else."""
    outside = imported_roots(path) - sys.stdlib_module_names - {"ollm_service"}
    assert not outside


def test_no_module_imports_itself_in_a_circle() -> None:
    """The modules of both packages can be put in an order in which each imports only earlier ones."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=True, cache_dir=None)
    order = graphlib.TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    order.prepare()  # raises CycleError naming the circle


@pytest.mark.parametrize(
    "module", ["ollm_service", "ollm_service.core", "ollm_service.cli", "ollm_service.bootstrap", "workers", "workers.app"]
)
def test_everything_but_the_runner_loads_without_a_model_library(module: str) -> None:
    """The service and the supervising worker process start where neither torch nor transformers is installed."""
    program = f"import sys; sys.modules.update(dict.fromkeys({MODEL_LIBRARIES!r})); import {module}"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr


def test_the_runner_imports_only_core_and_the_model_libraries() -> None:
    """The runner runs where only torch and transformers, with what they bring along, are installed."""
    brought_along = {*MODEL_LIBRARIES, "numpy", "tokenizers", "huggingface_hub"}
    for path in source_files("workers/runner"):
        outside = imported_roots(path) - sys.stdlib_module_names - brought_along - {"ollm_service", "workers"}
        assert outside <= OPTIONAL_LIBRARIES.get(path.name, set()), path


def test_settings_stay_few() -> None:
    """A new setting replaces another one or has a very good reason: each is a question to every operator."""
    assert len(Settings.model_fields) <= MOST_SETTINGS


def test_every_setting_is_documented() -> None:
    """The settings page is the one that the settings give; `make pages` writes it."""
    assert PAGE.read_text(encoding="utf-8") == page()
    assert all(field.description for field in Settings.model_fields.values())


def test_no_variable_is_read_behind_the_settings() -> None:
    """Every OLLM_ variable that the code names is a field of Settings, belongs to the client, or names the file."""
    fields = {f"OLLM_{name.upper()}" for name in Settings.model_fields}
    named = {
        name for path in source_files(*PACKAGES, "migrations") for name in re.findall(r"\bOLLM_[A-Z_]+[A-Z]\b", path.read_text())
    }
    assert named <= fields | OTHER_VARIABLES


def test_tests_wait_on_conditions_and_use_the_real_thing() -> None:
    """No test sleeps, mocks, patches our code or runs Celery eagerly."""
    shortcuts = re.compile(r"time\.sleep|import sleep|unittest.mock|monkeypatch\.setattr|task_always" + "_eager")
    offenders = [path for path in source_files("tests") if path != Path(__file__) and shortcuts.search(path.read_text())]
    assert not offenders
