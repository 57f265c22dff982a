"""Are the environment and `ollm.toml` read as documented, and is everything wrong in them refused by name?"""

from pathlib import Path

import pytest

from ollm_service.configuration import SERVICE_KEYS, read_file, read_options
from ollm_service.core.errors import MisconfiguredService
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.settings import Settings

FILE = """
port = 8123
models_dir = "from-file"
[runtime]
strategy_selector_profile = "capacity"
use_cache = false
[generation]
max_new_tokens = 20
stop = ["\\n"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an `ollm.toml`."""
    (tmp_path / "ollm.toml").write_text(FILE)
    return tmp_path


def test_request_environment_file_and_default_in_this_order(folder: Path) -> None:
    """Each option is found where it is said first, tables merged key by key."""
    environment = {"OLLM_RUNTIME__STRATEGY_SELECTOR_PROFILE": "latency", "ollm_generation__top_k": "3"}
    options = read_options(environment, folder)
    assert options.runtime_config({"device": "cpu"}) == RuntimeConfig(
        device="cpu", strategy_selector_profile="latency", use_cache=False
    )
    assert options.generation_config({"max_new_tokens": 7}) == GenerationConfig(max_new_tokens=7, top_k=3, stop=("\n",))


def test_nothing_is_kept_from_one_reading_to_the_next(folder: Path) -> None:
    """A file and an environment that change are read as they are then."""
    before = read_options({"OLLM_RUNTIME__DEVICE": "cpu"}, folder)
    (folder / "ollm.toml").write_text("[runtime]\nmultimodal = true")
    after = read_options({}, folder)
    assert before.runtime_config({}) == RuntimeConfig(device="cpu", strategy_selector_profile="capacity", use_cache=False)
    assert after.runtime_config({}) == RuntimeConfig(multimodal=True)


def test_without_file_and_variables_everything_is_left_open(tmp_path: Path) -> None:
    """Nothing needs to be written; other variables are no business of options."""
    options = read_options({"OLLM_BASE_URL": "http://x__y", "HOME": "/", "OLLM_PORT": "1"}, tmp_path)
    assert not any((*options.runtime, *options.generation))


def test_a_file_may_be_named(tmp_path: Path) -> None:
    """`OLLM_CONFIG_FILE` wins over the one in the working directory."""
    (tmp_path / "ollm.toml").write_text("[runtime]\ndevice = 'mps'")
    (tmp_path / "other.toml").write_text("[runtime]\ndevice = 'cpu'")
    assert read_options({"OLLM_CONFIG_FILE": "other.toml"}, tmp_path).runtime_config({}).device == "cpu"
    assert read_options({"OLLM_CONFIG_FILE": ""}, tmp_path).runtime_config({}).device == "mps"


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """Whoever names one wants it."""
    with pytest.raises(MisconfiguredService, match=r"OLLM_CONFIG_FILE names gone\.toml, which does not exist"):
        read_options({"OLLM_CONFIG_FILE": "gone.toml"}, tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("runtime = ", "The settings file ollm.toml is not TOML: "),
        (b"\xff = 1", "The settings file ollm.toml is not TOML: "),
        ("x = " + "[" * 5000, "The settings file ollm.toml cannot be read"),
        ("device = 'cpu'", "ollm.toml: `device` is not a setting. Allowed: data_dir, "),
        ("[runtimes]\ndevice = 'cpu'", "ollm.toml: `runtimes` is not a setting. Allowed: data_dir, "),
        ("runtime = 1", "ollm.toml: `runtime` must be a table, [runtime]."),
        ("[runtime]\nmodel = 'x'", "ollm.toml, [runtime] model is not an option. Allowed: device, "),
        ("[generation]\nstream = true", "ollm.toml, [generation] stream is not an option. Allowed: max_new_tokens, "),
        ("[generation]\ntop_p = 2", "ollm.toml, [generation] top_p: must be above 0 and at most 1."),
        ("[generation]\ntop_p = 2020-01-01", "ollm.toml, [generation] top_p: must be a number, not a date."),
        ("[runtime]\noffload_cpu_layers = 1\noffload_gpu_layers = 1", "offload_gpu_layers: cannot be combined"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path: Path, content: str | bytes, told: str) -> None:
    """It names the file, the key, and what is allowed."""
    (tmp_path / "ollm.toml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(MisconfiguredService) as refusal:
        read_options({}, tmp_path)
    assert told in refusal.value.message


@pytest.mark.parametrize(
    ("variable", "text", "told"),
    [
        ("OLLM_RUNTIME__MODEL", "x", "OLLM_RUNTIME__MODEL is not an option. Allowed: device, "),
        ("OLLM_RUNTIME__", "x", "OLLM_RUNTIME__ is not an option. Allowed: device, "),
        ("OLLM_RUNTIMES__DEVICE", "cpu", "OLLM_RUNTIMES__DEVICE is not a setting. "),
        ("OLLM_RUNTIME__USE_CACHE", "maybe", "OLLM_RUNTIME__USE_CACHE: must be true or false, not maybe."),
        ("OLLM_GENERATION__SEED", "-1", "OLLM_GENERATION__SEED: must be between 0"),
        ("OLLM_RUNTIME__KV_CACHE_STRATEGY", "chunked", "OLLM_RUNTIME__KV_CACHE_STRATEGY: `chunked` is not offered"),
    ],
)
def test_a_wrong_variable_is_refused_by_name(tmp_path: Path, variable: str, text: str, told: str) -> None:
    """And the owner of the machine is named where that is another one."""
    with pytest.raises(MisconfiguredService) as refusal:
        read_options({variable: text}, tmp_path)
    assert told in refusal.value.message


def test_places_of_another_machine_are_named_as_such(tmp_path: Path) -> None:
    """A user must not look for the server's variable in their own environment."""
    with pytest.raises(MisconfiguredService, match="the server's OLLM_RUNTIME__DEVICE: "):
        read_options({"OLLM_RUNTIME__DEVICE": "gpu"}, tmp_path, owner="the server's")


def test_the_keys_of_the_file_are_the_settings_of_the_service() -> None:
    """No setting is forgotten, none is left over."""
    assert set(SERVICE_KEYS) == set(Settings.model_fields)


def test_settings_are_read_from_the_file_beneath_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An override wins over a variable, a variable over the file, the file over the default."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OLLM_MODELS_DIR", "from-environment")
    settings = Settings.load(data_dir="given")
    assert (settings.port, settings.slots) == (8123, 1)
    assert (settings.models_dir, settings.data_dir) == (Path("from-environment"), Path("given"))
    assert Settings.load(models_dir="given").models_dir == Path("given")


def test_a_wrong_setting_is_named_where_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file and key, or the variable."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ollm.toml").write_text("port = 70000\nslots = 0")
    monkeypatch.setenv("OLLM_SLOTS", "99")
    with pytest.raises(MisconfiguredService) as refusal:
        Settings.load()
    assert "ollm.toml, port: " in refusal.value.message
    assert "OLLM_SLOTS: " in refusal.value.message


def test_a_worker_is_not_told_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its settings load whatever stands in the tables and variables that clients and coordinators resolve."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ollm.toml").write_text("slots = 2\n[runtime]\nmagic = 1")
    monkeypatch.setenv("OLLM_RUNTIME__DEVICE", "gpu")
    assert Settings.load().slots == 2


def test_a_missing_file_is_not_asked_for(tmp_path: Path) -> None:
    """Without one, and without a variable that names one, there is nothing in it."""
    assert read_file({}, tmp_path).service == {}
