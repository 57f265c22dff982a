"""Do the native plans of every family give the tokens of plain transformers?"""

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from ollm_service.core.options import KVCacheStrategy, RuntimeConfig
from ollm_service.core.passes import Applied, NotNeeded
from ollm_service.core.plan import BackendId, PassId
from ollm_service.core.planning import plan
from ollm_service.core.profile import ModelProfile
from ollm_service.core.resolution import HeldModel
from ollm_service.inspection import DigestCache, inspect_models
from scripts.train_demo_model import make_tokenizer
from tests.families import FAMILIES
from tests.runner.commands import first_outcomes, make_command, results_of, run, work_row
from tests.runner.models import plain_greedy
from tests.runner.test_exactness import NEW_TOKENS, PROMPTS
from workers.runner.engine import Engine

NATIVE = ("gemma3-text", "qwen3-next", "qwen3-moe", "gpt-oss")
GENERIC = ("mistral", "phi3", "mixtral", "deepseek-v3", "falcon", "lfm2")


def save_with_tokenizer(family: str, folder: Path) -> None:
    """A model of the family whose characters are tokens, and whose answers never end by themselves."""
    tokenizer = make_tokenizer()
    architecture, config = FAMILIES[family]()
    config.update(
        {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 1024,
            "initializer_range": 0.3,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    torch.manual_seed(0)
    model: Any = architecture(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models root with all of them; gpt-oss has an export, so that its provider matches."""
    root = tmp_path_factory.mktemp("families")
    for family in (*NATIVE, *GENERIC):
        save_with_tokenizer(family, root / family)
    export = root / "gpt-oss" / "gds_export"
    export.mkdir()
    (export / "norm.raw").write_bytes(b"raw")
    (export / "manifest.json").write_text(json.dumps({"model.norm.weight": {"path": "norm.raw", "dtype": "float16"}}))
    return root


@pytest.fixture(scope="module")
def profiles(root: Path) -> Mapping[str, ModelProfile]:
    """What inspection says of each."""
    return {profile.name: profile for profile in inspect_models(root, DigestCache())}


@cache
def expected(folder: Path, index: int) -> str:
    """The plain answer to one prompt, computed once."""
    return plain_greedy(folder, PROMPTS[index], NEW_TOKENS)


@pytest.mark.parametrize(
    ("family", "kv"),
    [
        *((family, KVCacheStrategy.RESIDENT) for family in (*NATIVE, *GENERIC)),
        *((family, KVCacheStrategy.PAGED) for family in NATIVE if family != "gpt-oss"),
    ],
)
def test_families_keep_the_tokens(
    engine: Engine, root: Path, profiles: Mapping[str, ModelProfile], tmp_path: Path, family: str, kv: KVCacheStrategy
) -> None:
    """Planned as the service plans them, in one batch; every planned pass ends well, with evidence where it acted."""
    config = RuntimeConfig(dense_projection_chunk_rows=7 if family == "gemma3-text" else None)
    found = plan(f"path:{family}", [HeldModel(profile=profiles[family], workers=("w",))], config).plan
    assert found.backend_id == (BackendId.OPTIMIZED_NATIVE if family in NATIVE else BackendId.TRANSFORMERS_GENERIC)
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    command = replace(
        make_command(root / family, rows, kv=kv, cache_dir=tmp_path), runtime_plan=found, profile=profiles[family], config=config
    )
    messages = run(engine, command)
    texts = {row: result.text for row, result in results_of(messages).items()}
    assert texts == {index: expected(root / family, index) for index in range(len(PROMPTS))}
    outcomes = first_outcomes(messages)
    assert tuple(outcomes) == found.specialization_pass_ids
    acted = {PassId.DISK_CACHE: kv is KVCacheStrategy.PAGED, PassId.MLP_CHUNKING: True, PassId.ATTENTION_REPLACEMENT: True}
    for pass_id, outcome in outcomes.items():
        assert isinstance(outcome, Applied if acted.get(pass_id) else NotNeeded)


def test_packed_experts_are_unpacked(engine: Engine, root: Path, tmp_path: Path) -> None:
    """An mxfp4 checkpoint runs in bfloat16, as its profile says, without kernels of its own."""
    folder = tmp_path / "packed"
    tokenizer = make_tokenizer()
    architecture, config = FAMILIES["gpt-oss"]()
    config.update(
        {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "eos_token_id": tokenizer.eos_token_id}
    )
    model: Any = architecture(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj")]:
        experts, inner, outer = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.full((experts, outer, inner // 32, 16), 0x22, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full((experts, outer, inner // 32), 127, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**saved, "quantization_config": {"quant_method": "mxfp4"}}))
    messages = run(engine, make_command(folder, [work_row(0, "x", max_new_tokens=3)]))
    assert results_of(messages)[0].completion_tokens > 0
