"""How is a model brought into memory of which some layers stay outside the device?

Everything that the placement keeps is read once and stays. The other layers are without weights until `LayerStream.open`; a
vocabulary on disk is looked up there.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ollm_service.core.laying_out import laying_out_bytes, takes_export
from ollm_service.core.wire import Execute
from workers.runner.interruptions import AttemptEnded, first_line
from workers.runner.raw import pages
from workers.runner.weights.export import open_export
from workers.runner.weights.extents import CorruptExtents, Extent, ExtentFile, Origin, tensors_of
from workers.runner.weights.parts import vocabulary_keys
from workers.runner.weights.repack import NoRoomForExtents, forget_extents, open_extents, skeleton
from workers.runner.weights.streaming import LayerStream, layer_names, off_device, on_device, place_of
from workers.runner.weights.vocabulary import head_tiles, leave_on_disk


def reads_export(command: Execute) -> bool:
    """Whether the plan takes its weights from the raw export in the model's folder, which is where layers come from disk."""
    return takes_export(command.runtime_plan) and bool(command.placement.host_layers or command.placement.disk_layers)


def load_offloaded(command: Execute, device: torch.device, visit: Callable[[], None]) -> tuple[PreTrainedModel, LayerStream]:
    """The model, and what brings its other layers. `visit` is called while that gets on.

    Raises AttemptEnded without a folder for extents, without room for them, and where they are corrupt even when made anew;
    PassFailed where an export is to be read and cannot be; OSError, and whatever transformers raises for a checkpoint that it
    cannot load.
    """
    if reads_export(command):
        return _load_export(command, device, visit)
    if command.weights_dir is None:
        raise _ended("no_cache_folder", "Layers can be read from disk only where the worker has a cache folder.", "NoCacheFolder")
    folder = Path(command.weights_dir, command.profile.digest)
    try:
        with _closed_on_failure(_made(command, folder, visit)) as source:
            try:
                return _load(command, source, device, visit)
            except CorruptExtents:
                forget_extents(folder, source, visit)
                source.close()  # an open file would keep its place on the disk while it is made again
        with _closed_on_failure(_made(command, folder, visit)) as source:
            return _load(command, source, device, visit)
    except CorruptExtents as error:
        raise _ended(
            "weights_corrupt", f"Weights that were written twice cannot be read back: {first_line(error)}", error
        ) from error
    except NoRoomForExtents as error:
        raise _ended("disk_full", first_line(error), error) from error


def _load_export(command: Execute, device: torch.device, visit: Callable[[], None]) -> tuple[PreTrainedModel, LayerStream]:
    with _closed_on_failure(open_export(Path(command.model_dir))) as source:
        try:
            return _load(command, source, device, visit)
        except CorruptExtents as error:
            raise source.refusal(error) from error


@contextmanager
def _closed_on_failure(source: ExtentFile) -> Iterator[ExtentFile]:
    try:
        yield source
    except BaseException:
        source.close()
        raise


def _made(command: Execute, folder: Path, visit: Callable[[], None]) -> ExtentFile:
    origin = Origin(digest=command.profile.digest, transformers=transformers.__version__)
    kind = command.runtime_plan.generic_model_kind
    return open_extents(Path(command.model_dir), folder, origin, kind, laying_out_bytes(command.profile), visit)


def _load(
    command: Execute, source: ExtentFile, device: torch.device, visit: Callable[[], None]
) -> tuple[PreTrainedModel, LayerStream]:
    placement = command.placement
    module = skeleton(Path(command.model_dir), command.runtime_plan.generic_model_kind)
    _refuse_misfits(module, source)
    names = layer_names(module)
    in_host = [names[layer] for layer in placement.host_layers]
    on_disk = [names[layer] for layer in placement.disk_layers]
    away = {*in_host, *on_disk, *(vocabulary_keys(module) if placement.vocabulary_on_disk else ())}
    for extents in _resident(source, names, away):
        _put(module, source, extents, device)
        visit()
    module.tie_weights()
    _move_buffers(module, device)
    _refuse_unbound(module, away)
    host = {name: _read(source, source.layer(name), device) for name in in_host}
    layers = [off_device(module, name, source.layer(name)) for name in names if name in away]
    tiles = head_tiles(module, source) if placement.vocabulary_on_disk else ()
    stream = LayerStream(layers, source, device, host, tiles)
    if placement.vocabulary_on_disk:
        leave_on_disk(module, stream)
    return module, stream


def _refuse_misfits(module: PreTrainedModel, source: ExtentFile) -> None:
    """Extents that lack a layer, or hold tensors of other shapes or dtypes than the model, are none of this model's."""
    wanted = {"", *layer_names(module)}
    if not wanted <= source.extents.keys():
        raise CorruptExtents(f"there is no extent for `{min(wanted - source.extents.keys())}`")
    held = {**dict(module.named_buffers()), **dict(module.named_parameters())}
    rows: dict[str, int] = {}
    for extent in source.extents.values():
        for span in extent.spans:
            tensor = held.get(span.name)
            kept = slice(None) if extent.first is None else slice(1, None)
            if tensor is None or str(tensor.dtype) != f"torch.{span.dtype}" or tuple(tensor.shape)[kept] != span.shape[kept]:
                raise CorruptExtents(f"`{span.name}` is not as the model has it")
            if extent.first is not None:
                rows[span.name] = rows.get(span.name, 0) + span.shape[0]
    for name, count in rows.items():
        if held[name].shape[0] != count:
            raise CorruptExtents(f"`{name}` has {count:,} of {held[name].shape[0]:,} rows")


def _resident(source: ExtentFile, names: Sequence[str], away: Collection[str]) -> Iterator[Sequence[Extent]]:
    """The extents of everything that stays on the device, those that lie together in one piece."""
    yield (source.extents[""],)
    yield from (source.layer(name) for name in names if name not in away)
    in_layers = tuple(f"{name}." for name in names)
    beside = [owner for owner in source.slices if not owner.startswith(in_layers) and owner not in away]
    yield from (source.slices[owner] for owner in beside)


def _read(source: ExtentFile, extents: Sequence[Extent], device: torch.device | None = None) -> Tensor:
    """Their bytes in host memory, where they stay for this device if one is named."""
    buffer = pages(sum(extent.size for extent in extents), device)
    source.read_all(extents, buffer)
    return buffer


def _put(module: nn.Module, source: ExtentFile, extents: Sequence[Extent], device: torch.device) -> None:
    """Bring tensors to where they belong, for good."""
    for key, held in tensors_of(_read(source, extents), extents).items():
        tensor, place = on_device(held, device), place_of(module, key)
        if place.name in place.module._buffers:
            place.module._buffers[place.name] = tensor
        else:
            place.put(nn.Parameter(tensor, requires_grad=False))


def _move_buffers(module: nn.Module, device: torch.device) -> None:
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and not buffer.is_meta:
                child._buffers[name] = on_device(buffer, device)


def _refuse_unbound(module: nn.Module, away: Collection[str]) -> None:
    """A weight that is nowhere would be computed with silently: on the CPU torch makes up a product with a meta tensor."""
    tensors: Iterable[tuple[str, Tensor]] = [*module.named_parameters(), *module.named_buffers()]
    absent = tuple(f"{name}." for name in away)
    unbound = [key for key, tensor in tensors if tensor.is_meta and not f"{key}.".startswith(absent)]
    if unbound:
        raise _ended(
            "load_failed", f"{len(unbound)} weights were not found in the extents, such as {unbound[0]}.", "MissingWeights"
        )


def _ended(code: str, message: str, error: BaseException | str) -> AttemptEnded:
    kind = error if isinstance(error, str) else type(error).__name__
    return AttemptEnded(stage="loading", code=code, message=message, error_type=kind)
