"""How is a model brought into memory of which some layers stay outside the device?

Everything that the placement keeps is read once and stays. The other layers are without weights until `LayerStream.open`.
"""

from collections.abc import Callable, Collection, Iterable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ollm_service.core.wire import Execute
from workers.runner.interruptions import AttemptEnded, first_line
from workers.runner.raw import pages
from workers.runner.weights.extents import CorruptExtents, ExtentFile, Origin
from workers.runner.weights.repack import NoRoomForExtents, forget_extents, open_extents, skeleton
from workers.runner.weights.streaming import LayerStream, layer_names, off_device, on_device, place_of


def load_offloaded(command: Execute, device: torch.device, visit: Callable[[], None]) -> tuple[PreTrainedModel, LayerStream]:
    """The model, and what brings its other layers. `visit` is called while that gets on.

    Raises AttemptEnded without a folder for extents, without room for them, and where they are corrupt even when made anew;
    OSError, and whatever transformers raises for a checkpoint that it cannot load.
    """
    if command.weights_dir is None:
        raise _ended("no_cache_folder", "Layers can be read from disk only where the worker has a cache folder.", "NoCacheFolder")
    folder = Path(command.weights_dir, command.profile.digest)
    try:
        try:
            return _load(command, folder, device, visit)
        except CorruptExtents:
            forget_extents(folder, visit)
            return _load(command, folder, device, visit)
    except CorruptExtents as error:
        raise _ended(
            "weights_corrupt", f"Weights that were written twice cannot be read back: {first_line(error)}", error
        ) from error
    except NoRoomForExtents as error:
        raise _ended("disk_full", first_line(error), error) from error


def _load(command: Execute, folder: Path, device: torch.device, visit: Callable[[], None]) -> tuple[PreTrainedModel, LayerStream]:
    model_dir, placement, kind = Path(command.model_dir), command.placement, command.runtime_plan.generic_model_kind
    origin = Origin(digest=command.profile.digest, transformers=transformers.__version__)
    source = open_extents(model_dir, folder, origin, kind, command.profile.weight_bytes, visit)
    try:
        module = skeleton(model_dir, kind)
        names = layer_names(module)
        in_host = [names[layer] for layer in placement.host_layers]
        on_disk = [names[layer] for layer in placement.disk_layers]
        away = {*in_host, *on_disk}
        for extent in source.extents:
            if extent not in away:
                _put(module, source, extent, device)
                visit()
        module.tie_weights()
        _move_buffers(module, device)
        _refuse_unbound(module, away)
        host = {extent: _read(source, extent) for extent in in_host}
        layers = [off_device(module, name, source.extents[name].spans) for name in names if name in away]
        return module, LayerStream(layers, source, device, host)
    except BaseException:
        source.close()
        raise


def _read(source: ExtentFile, extent: str) -> Tensor:
    buffer = pages(source.extents[extent].size)
    source.read(extent, buffer)
    return buffer


def _put(module: nn.Module, source: ExtentFile, extent: str, device: torch.device) -> None:
    """Bring an extent's tensors to where they belong, for good."""
    buffer = _read(source, extent)
    for span in source.extents[extent].spans:
        tensor = on_device(span.of(buffer), device)
        place = place_of(module, span.name)
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
    unbound = [key for key, tensor in tensors if tensor.is_meta and not any(key.startswith(f"{name}.") for name in away)]
    if unbound:
        raise _ended(
            "load_failed", f"{len(unbound)} weights were not found in the extents, such as {unbound[0]}.", "MissingWeights"
        )


def _ended(code: str, message: str, error: BaseException | str) -> AttemptEnded:
    kind = error if isinstance(error, str) else type(error).__name__
    return AttemptEnded(stage="loading", code=code, message=message, error_type=kind)
