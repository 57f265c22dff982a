"""Does an adapter change a model as plain peft does, and is one that does not fit refused in words?"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ollm_service.core.checkpoint import BrokenCheckpoint
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import BackendId
from ollm_service.core.wire import AttemptFailed, Execute, Loaded
from ollm_service.inspection import inspect_adapter
from tests.runner.commands import only, results_of, run, work_row
from tests.runner.models import save_model
from tests.runner.planned import planned_command
from workers.runner.engine import Engine

PROMPTS = ("hello", "a longer prompt than the other", "x")
NEW_TOKENS = 10


def save_adapter(folder: Path, model_dir: Path, **changes: Any) -> None:
    """A LoRA adapter with random weights, saved by peft."""
    torch.manual_seed(5)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, **changes)
    get_peft_model(model, config).save_pretrained(str(folder))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with a model, another of other sizes, and an adapter for the first."""
    root = tmp_path_factory.mktemp("adapters")
    save_model(root / "llama", "llama")
    save_model(root / "gpt2", "gpt2")
    save_adapter(root / "lora", root / "llama")
    return root


def command_with(root: Path, model: str, adapter: str | None) -> Execute:
    """Execute the prompts with an adapter, as a worker sends it."""
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    command = planned_command(root / model, rows, RuntimeConfig(adapter_dir=adapter))
    return replace(command, adapter=None if adapter is None else inspect_adapter(root, PurePosixPath(adapter)))


def plain(root: Path, prompt: str) -> str:
    """What transformers and peft generate for one prompt alone, greedily."""
    tokenizer: Any = AutoTokenizer.from_pretrained(root / "llama")
    base: Any = AutoModelForCausalLM.from_pretrained(root / "llama")
    model: Any = PeftModel.from_pretrained(base, str(root / "lora")).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_tokens_are_those_of_plain_peft(engine: Engine, root: Path) -> None:
    """A plan with an adapter is generic and gives peft's tokens; with and without it are two models to a warm runner."""
    adapted = command_with(root, "llama", "lora")
    assert adapted.runtime_plan.backend_id == BackendId.TRANSFORMERS_GENERIC
    messages = run(engine, adapted)
    texts = {row: result.text for row, result in results_of(messages).items()}
    assert texts == {index: plain(root, prompt) for index, prompt in enumerate(PROMPTS)}
    bare = run(engine, command_with(root, "llama", None))
    assert not only(bare, Loaded).was_warm
    assert {row: result.text for row, result in results_of(bare).items()} != texts
    again = run(engine, adapted)
    assert {row: result.text for row, result in results_of(again).items()} == texts


def test_an_adapter_for_another_model_is_refused(engine: Engine, root: Path) -> None:
    """Layers that the model does not have are an error that says what to do, and the runner goes on."""
    failure = only(run(engine, command_with(root, "gpt2", "lora")), AttemptFailed)
    assert (failure.code, failure.is_permanent) == ("adapter_refused", True)
    assert "the model that it was trained on" in failure.message
    assert len(results_of(run(engine, command_with(root, "llama", None)))) == len(PROMPTS)


@pytest.mark.parametrize("spoil", ["lacks", "no place for", "has the shape"])
def test_weights_that_do_not_fit_are_refused(engine: Engine, root: Path, spoil: str) -> None:
    """A weight too few, one too many, and one of another shape: each is named before a row runs."""
    folder = root / spoil.replace(" ", "-")
    shutil.copytree(root / "lora", folder, dirs_exist_ok=True)
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(iter(weights))
    if spoil == "lacks":
        del weights[name]
    elif spoil == "no place for":
        weights[name.replace("layers.0", "layers.77").replace("layers.1", "layers.77")] = weights[name].clone()
    else:
        weights[name] = weights[name][:, :-1].clone()
    save_file(weights, folder / "adapter_model.safetensors")
    failure = only(run(engine, command_with(root, "llama", folder.name)), AttemptFailed)
    assert failure.code == "adapter_refused"
    assert spoil in failure.message


def set_config(**changes: Any) -> Callable[[Path], None]:
    """Change an adapter's configuration."""

    def spoil(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def link_out(folder: Path) -> None:
    """Let the weights lie outside of the folder."""
    outside = folder.parent.parent / f"{folder.name}.safetensors"
    shutil.move(folder / "adapter_model.safetensors", outside)
    (folder / "adapter_model.safetensors").symlink_to(outside)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (set_config(peft_type="XLORA"), "peft_type is XLORA"),
        (set_config(peft_type=None), "peft_type is"),
        (set_config(megatron_config={"x": 1}), "megatron_config"),
        (set_config(corda_config={"cache_file": "/tmp/x"}), "corda_config"),
        (set_config(init_lora_weights="pissa"), "init_lora_weights is pissa"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64), "not a safetensors file"),
        (lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"), "pickle"),
        (lambda folder: (folder / "adapter_config.json").write_text("["), "not JSON"),
        (link_out, "leaves the model's folder"),
    ],
)
def test_a_broken_adapter_is_refused_before_a_runner_sees_it(
    root: Path, tmp_path: Path, spoil: Callable[[Path], object], words: str
) -> None:
    """What could run code, read other files or is not whole is refused with its reason."""
    folder = tmp_path / "models" / "bad"
    shutil.copytree(root / "lora", folder)
    spoil(folder)
    with pytest.raises(BrokenCheckpoint, match=words):
        inspect_adapter(folder.parent, PurePosixPath("bad"))


def test_an_absent_adapter_is_told_apart(root: Path) -> None:
    """A worker that lacks the folder can leave the plan to another one."""
    with pytest.raises(FileNotFoundError, match="nowhere is not in the models folder"):
        inspect_adapter(root, PurePosixPath("nowhere"))
