"""How do a checkpoint's weights become extents? Once for each model, through transformers' own loader.

Checkpoints do not hold what modules hold: transformers renames and joins weights while it loads them, so that only what it has
loaded can be streamed. It is asked to keep all weights on disk. What it only renames stays in the checkpoint and takes no memory;
what it joins, as experts, takes a few times the largest tensor that comes of it (`joining_host_bytes`).
"""

import errno
import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from accelerate import init_empty_weights
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ollm_service.core.laying_out import SCRATCH, WRITER_LOCK
from ollm_service.core.passing import tile_rows
from ollm_service.core.plan import GenericModelKind
from workers.runner.weights.checkpoint import AUTO_CLASSES, load_checkpoint
from workers.runner.weights.extents import CorruptExtents, ExtentFile, ExtentWriter, Origin
from workers.runner.weights.parts import experts_of, vocabulary_keys
from workers.runner.weights.streaming import layer_names

_WAIT_SECONDS = 0.2


class NoRoomForExtents(Exception):
    """The disk has too little room for a second form of the weights."""


def skeleton(model_dir: Path, kind: GenericModelKind | None) -> PreTrainedModel:
    """The model without its weights, which are on the meta device; buffers that no checkpoint holds are there."""
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        module: PreTrainedModel = AUTO_CLASSES[kind].from_config(config, dtype=config.dtype, trust_remote_code=False)
    if module.can_generate() and (model_dir / "generation_config.json").is_file():
        module.generation_config = GenerationConfig.from_pretrained(model_dir, local_files_only=True)
    module.train(mode=False).requires_grad_(requires_grad=False)
    return module


def open_extents(
    model_dir: Path, folder: Path, origin: Origin, kind: GenericModelKind | None, needed_bytes: int, visit: Callable[[], None]
) -> ExtentFile:
    """The model's extents in `folder`, which are made where they are not there. `visit` is called while that gets on.

    `needed_bytes` have to be free then, less what is there of them: `core/laying_out.py` knows.

    Raises NoRoomForExtents, OSError, and whatever transformers raises for a checkpoint that it cannot load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / WRITER_LOCK, visit):
        try:
            return ExtentFile(folder, origin)
        except (CorruptExtents, FileNotFoundError):
            _repack(model_dir, folder, origin, kind, needed_bytes, visit)
            return ExtentFile(folder, origin)


def forget_extents(folder: Path, source: ExtentFile, visit: Callable[[], None]) -> None:
    """Delete extents that have turned out to be corrupt, unless another runner has made them again already. Raises OSError."""
    with _locked(folder / WRITER_LOCK, visit):
        source.delete()


def _repack(
    model_dir: Path, folder: Path, origin: Origin, kind: GenericModelKind | None, needed_bytes: int, visit: Callable[[], None]
) -> None:
    scratch = folder / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # of a writer that was killed; the lock is ours
    try:
        with closing(ExtentWriter(folder, origin)) as writer:
            there = sum(extent.size for extent in writer.written.values())
            needed, free = needed_bytes - there, shutil.disk_usage(folder).free
            if needed > free:
                raise NoRoomForExtents(
                    f"{needed:,} bytes are needed in {folder} to lay the weights out by layers, {free:,} are free"
                )
            scratch.mkdir()
            module, loader = loaded_on_disk(model_dir, scratch, kind)
            write_model(writer, module, loader, visit)
    except (OSError, SafetensorError) as error:
        full = _full_disk(error)
        if full is None:
            raise
        raise NoRoomForExtents(
            f"{full} in {folder}, where the weights are laid out by layers. Make room, and it goes on from there."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _full_disk(error: OSError | SafetensorError) -> str | None:
    """What the system says of a full disk, which transformers' joined weights meet inside safetensors; None for anything else."""
    for number in (errno.ENOSPC, errno.EDQUOT):
        if (isinstance(error, OSError) and error.errno == number) or f"(os error {number})" in str(error):
            return os.strerror(number)
    return None


def loaded_on_disk(model_dir: Path, scratch: Path, kind: GenericModelKind | None) -> tuple[PreTrainedModel, Mapping[str, Tensor]]:
    """The model with everything on disk, and its weights by the names of its modules, read when they are asked for."""
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of what we ask for
    module = load_checkpoint(model_dir, kind, device_map={"": "disk"}, offload_folder=str(scratch))
    hooks = [hook for child in module.modules() if (hook := getattr(child, "_hf_hook", None)) is not None]
    weights = next(hook.weights_map for hook in hooks if hook.weights_map)
    loader = weights.dataset if isinstance(weights, PrefixedDataset) else weights
    assert isinstance(loader, OffloadedWeightsLoader)
    remove_hook_from_submodules(module)
    return module, loader


def write_model(writer: ExtentWriter, module: PreTrainedModel, loader: Mapping[str, Tensor], visit: Callable[[], None]) -> None:
    """Write all extents of a model that are not there yet, and say that they are whole. Raises OSError.

    `loader` has the weights by name that are not in the module's own memory. An owner's tensors are held while its slices are
    written, which takes no memory where the loader has mapped them.
    """
    kept_of = {key: tensor for layer in _by_layer(module).values() for key, tensor in layer.items()}
    for _owner, pieces in groupby(_pieces(module), key=lambda piece: piece.owner):
        missing = [piece for piece in pieces if piece.name not in writer.written]
        held: dict[str, Tensor] = {}
        for piece in missing:
            writer.append(piece.name, (_part(loader, kept_of, held, key, piece) for key in piece.keys), visit, piece.first)
        writer.settle()
    writer.finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """One extent to be: its tensors' names, and where along their first dimension it begins and ends; whole without `first`."""

    owner: str
    name: str
    keys: tuple[str, ...]
    first: int | None = None
    last: int | None = None


def _part(
    loader: Mapping[str, Tensor], kept_of: Mapping[str, Tensor], held: dict[str, Tensor], key: str, piece: _Piece
) -> tuple[str, Tensor]:
    """A tensor or its slice, in the dtype that its module has it in; buffers are in memory already."""
    kept = kept_of[key]
    if piece.first is None:
        return key, loader[key].to(kept.dtype) if kept.is_meta else kept
    if key not in held:
        held[key] = loader[key] if kept.is_meta else kept
    return key, held[key][piece.first : piece.last].to(kept.dtype)


def _pieces(module: PreTrainedModel) -> Iterator[_Piece]:
    """The extents of a model, in the order in which they are to lie: what is in no layer, the vocabulary, the layers."""
    matrices = vocabulary_keys(module)
    for name, tensors in _by_layer(module).items():
        owners = experts_of(module, name) if name else {}
        sliced = {*matrices, *(f"{owner}.{key}" for owner, experts in owners.items() for key in experts._parameters)}
        yield _Piece(owner=name, name=name, keys=tuple(key for key in tensors if key not in sliced))
        if not name:
            for key in matrices:
                yield from _slices(key, (key,), tensors[key].shape[0], tile_rows(tensors[key][0].nbytes))
        for owner, experts in owners.items():
            keys = tuple(f"{owner}.{key}" for key in experts._parameters)
            yield from _slices(owner, keys, tensors[keys[0]].shape[0], 1)


def _slices(owner: str, keys: tuple[str, ...], rows: int, each: int) -> Iterator[_Piece]:
    for number, first in enumerate(range(0, rows, each)):
        yield _Piece(owner=owner, name=f"{owner}/{number}", keys=keys, first=first, last=min(rows, first + each))


def _by_layer(module: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """The model's parameters by layer; `""` has those of no layer, and all buffers that checkpoints hold. Tied ones once."""
    layers = layer_names(module)
    found: dict[str, dict[str, Tensor]] = {name: {} for name in ("", *layers)}
    for key, tensor in module.named_parameters():
        found[next((name for name in layers if key.startswith(f"{name}.")), "")][key] = tensor
    saved = module.state_dict().keys()
    found[""] |= {key: tensor for key, tensor in module.named_buffers() if key in saved}
    return found


@contextmanager
def _locked(path: Path, visit: Callable[[], None]) -> Iterator[None]:
    """Hold a lock that the kernel drops with the process; `visit` is called while another runner holds it."""
    with path.open("wb") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                visit()
                time.sleep(_WAIT_SECONDS)
        yield
