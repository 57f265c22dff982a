"""Do packed weights give the tokens of the plain ones that they stand for, and does nobody guess at what is not understood?"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ollm_service.core.capabilities import Capabilities, Device
from ollm_service.core.matching import Match, NoMatch, match
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import BackendId
from ollm_service.core.requirements import requirements_of
from ollm_service.core.wire import AttemptFailed
from tests.runner.commands import only, run, texts, work_row
from tests.runner.models import plain_greedy, save_model
from tests.runner.planned import planned_command, profile_of
from workers.runner.engine import Engine

PROMPTS = ("hello", "a longer prompt than the other", "x")
NEW_TOKENS = 8
GROUP = 16
# How compressed-tensors packs; the format follows from it.
SCHEMES: Mapping[str, dict[str, Any]] = {
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True},
    "float-quantized": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
}


def on_grid(weight: Tensor, scheme: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The nearest weights that the scheme can hold exactly, and their scales."""
    groups = weight.reshape(weight.shape[0], -1, GROUP) if "group_size" in scheme else weight.unsqueeze(1)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-6) / (7 if scheme["type"] == "int" else 448)
    steps = groups / scale
    rounded = steps.round() if scheme["type"] == "int" else steps.to(torch.float8_e4m3fn).float()
    return (rounded * scale).reshape(weight.shape), scale.reshape(weight.shape[0], -1)


def save_pair(root: Path, form: str) -> None:
    """`plain-FORM`, whose weights the form can hold exactly, and `FORM`, where they are packed."""
    scheme, folder = SCHEMES[form], save_model(root / f"plain-{form}", "llama")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    arguments = QuantizationArgs(**scheme)
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=arguments)}, ignore=["lm_head"], format=form
    )
    config.quantization_status = QuantizationStatus.FROZEN
    scales: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            exact, scales[name] = on_grid(module.weight.data, scheme)
            module.weight.data = exact
    model.save_pretrained(folder)
    apply_quantization_config(model, config)
    for name, scale in scales.items():
        model.get_submodule(name).weight_scale.data = scale
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    packed = root / form
    shutil.copytree(folder, packed)
    model.save_pretrained(packed)
    compressor.update_config(str(packed))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with a pair for each form."""
    root = tmp_path_factory.mktemp("quantized")
    for form in SCHEMES:
        save_pair(root, form)
    return root


@pytest.mark.parametrize("form", SCHEMES)
def test_packed_weights_give_the_tokens_of_plain_ones(engine: Engine, root: Path, form: str) -> None:
    """A checkpoint of compressed-tensors runs generically, and its tokens are those of the same numbers unpacked."""
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    command = planned_command(root / form, rows)
    assert command.runtime_plan.backend_id == BackendId.TRANSFORMERS_GENERIC
    assert "quantized by compressed-tensors" in command.runtime_plan.reason
    expected = {index: plain_greedy(root / f"plain-{form}", prompt, NEW_TOKENS) for index, prompt in enumerate(PROMPTS)}
    assert texts(engine, command) == expected


@pytest.mark.parametrize("form", SCHEMES)
def test_memory_is_counted_unpacked(root: Path, form: str) -> None:
    """What the runner makes of packed weights is as large as the plain model, and so does its profile say."""
    packed, plain = profile_of(root / form), profile_of(root / f"plain-{form}")
    assert packed.quantization == "compressed-tensors"
    assert (packed.weight_bytes, packed.parameter_count) == (plain.weight_bytes, plain.parameter_count)
    assert packed.layer_bytes == plain.layer_bytes


def test_only_workers_with_the_library_are_given_the_plan(root: Path) -> None:
    """The method is a requirement; who lacks the library says which one it is."""
    profile = profile_of(root / "pack-quantized")
    plan = planned_command(root / "pack-quantized", []).runtime_plan
    needs = requirements_of(plan, profile, RuntimeConfig())

    def worker(why_not: str | None) -> Capabilities:
        return Capabilities(
            node="n",
            slots=1,
            devices=(Device(device_id="cpu", name="cpu", memory_bytes=2**30),),
            host_memory_bytes=2**30,
            backends={BackendId.TRANSFORMERS_GENERIC.value: None},
            passes={},
            kv_strategies={},
            quantizations={"compressed-tensors": why_not},
            models=(profile,),
        )

    assert match(needs, worker(None)) == Match()
    refusal = match(needs, worker("compressed-tensors is not installed on this worker"))
    assert refusal == NoMatch(
        reasons=("weights quantized by compressed-tensors: compressed-tensors is not installed on this worker",)
    )


def test_packed_numbers_are_never_taken_for_plain_ones(engine: Engine, root: Path, tmp_path: Path) -> None:
    """Where the configuration does not say that weights are packed, their scales find no use: nonsense is not answered."""
    folder = tmp_path / "odd"
    shutil.copytree(root / "float-quantized", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    failure = only(run(engine, planned_command(folder, [work_row(0, "x")])), AttemptFailed)
    assert failure.code == "weights_left_out"


def test_a_broken_scheme_is_a_failed_load(engine: Engine, root: Path, tmp_path: Path) -> None:
    """A configuration that the library does not understand ends the attempt with its reason."""
    folder = tmp_path / "broken"
    shutil.copytree(root / "pack-quantized", folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = "many"
    (folder / "config.json").write_text(json.dumps(config))
    failure = only(run(engine, planned_command(folder, [work_row(0, "x")])), AttemptFailed)
    assert failure.code == "load_failed"
