"""Model folders made by hand: real configurations and safetensors headers over zeros, small enough to make hundreds."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TINY_LLAMA: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "float32",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
TENSORS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("F32", (64, 16)),
    "model.norm.weight": ("F32", (16,)),
}
_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}


def safetensors_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]] = TENSORS) -> bytes:
    """A well-formed safetensors file of zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    return framed(json.dumps(header).encode(), b"\0" * end)


def framed(header: bytes, data: bytes = b"") -> bytes:
    """A safetensors file with exactly this header and data, sound or not."""
    return len(header).to_bytes(8, "little") + header + data


def make_model(
    folder: Path,
    config: Mapping[str, Any] = TINY_LLAMA,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]] = TENSORS,
    tokenizer_config: Mapping[str, Any] | None = None,
) -> Path:
    """A whole, safe model folder of one weight file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config or {}))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    return folder


def make_sharded_model(folder: Path) -> Path:
    """The same model in two weight files with their index."""
    make_model(folder)
    (folder / "model.safetensors").unlink()
    names = dict(zip(TENSORS, ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"), strict=True))
    for tensor, shard in names.items():
        (folder / shard).write_bytes(safetensors_bytes({tensor: TENSORS[tensor]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def make_hub_snapshot(root: Path, repo_id: str, revision: str, refs: tuple[str, ...] = ()) -> Path:
    """A snapshot in the hub cache's layout: files are links into the repository's blobs."""
    repo = root / ("models--" + repo_id.replace("/", "--"))
    snapshot = repo / "snapshots" / revision
    plain = make_model(root / ".making" / revision)
    (repo / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True)
    for file in plain.iterdir():
        blob = repo / "blobs" / f"{revision}-{file.name}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    plain.rmdir()
    for ref in refs:
        (repo / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / ref).write_text(revision)
    return snapshot
