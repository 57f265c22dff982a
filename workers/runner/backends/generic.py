"""How does `transformers-generic` bring a model into memory? The plain Auto class, whole on the device or as it was placed.

Safetensors only, no remote code, nothing fetched.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ollm_service.core.plan import BackendId, GenericModelKind, NativeFamily
from ollm_service.core.quantization import stays_packed
from ollm_service.core.wire import Execute
from workers.runner.backends.drafts import load_draft
from workers.runner.interruptions import AttemptEnded, first_line
from workers.runner.media.conversation import VOXTRAL_TEMPLATE
from workers.runner.media.readers import open_reader
from workers.runner.memory import let_go_of_pages
from workers.runner.model import LoadedModel, ModelKey, resident_cache
from workers.runner.prompts import ReadsMedia
from workers.runner.weights.checkpoint import load_checkpoint, refuse_unknown_architecture
from workers.runner.weights.offload import load_offloaded, reads_export


def model_key(command: Execute) -> ModelKey:
    """Which model, where, the command needs."""
    placement = command.placement
    return ModelKey(
        model_dir=command.model_dir,
        digest=command.profile.digest,
        device_id=placement.device_id,
        host_layers=placement.host_layers,
        disk_layers=placement.disk_layers,
        adapter_digest=None if command.adapter is None else command.adapter.digest,
        vocabulary_on_disk=placement.vocabulary_on_disk,
        reads_export=reads_export(command),
        draft_digest=command.draft_digest,
    )


def load(command: Execute, visit: Callable[[], None]) -> LoadedModel:
    """Load model and tokenizer in the checkpoint's own dtype; `visit` is called while that gets on.

    Raises AttemptEnded for a kind that it does not run, and for what `load_checkpoint` and `load_offloaded` do.
    """
    kind = command.runtime_plan.generic_model_kind
    _refuse_other_kinds(command)
    refuse_unknown_architecture(Path(command.model_dir), kind)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    folder, device = Path(command.model_dir), torch.device(command.placement.device_id)
    tokenizer = _tokenizer(folder, command.profile.family)
    key, stream = model_key(command), None
    if key.host_layers or key.disk_layers:
        module, stream = load_offloaded(command, device, visit)
    else:
        module = _load_whole(folder, kind, device, stays_packed=stays_packed(command.profile.quantization))
    if command.adapter is not None:
        # peft need not be installed where no plan names an adapter.
        importlib.import_module("workers.runner.backends.adapters").put_on(module, command.adapter)
    _keep_the_head_small(module)
    end_tokens = _end_tokens(module, tokenizer)
    feeds_itself = kind is GenericModelKind.IMAGE_TEXT_TO_TEXT and command.profile.family is None
    if feeds_itself:
        # `generate` would mix the model's own settings, such as a penalty on repetition, into what the row asked for.
        module.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    return LoadedModel(
        key=key,
        module=module,
        tokenizer=tokenizer,
        device=device,
        context_limit=_context_limit(module, command.profile.max_context_tokens),
        end_tokens=end_tokens,
        pad_token=_pad_token(tokenizer, end_tokens),
        open_cache=resident_cache(module),
        stream=stream,
        feeds_itself=feeds_itself,
        draft=None if command.draft_dir is None else load_draft(Path(command.draft_dir), tokenizer, device),
    )


def media_reader(model: LoadedModel, command: Execute) -> ReadsMedia | None:
    """What reads images for a generic plan that takes them; a native plan's pass brings its own.

    Raises AttemptEnded where the processor's files or its library are not sound.
    """
    is_generic = command.runtime_plan.backend_id == BackendId.TRANSFORMERS_GENERIC
    if not (is_generic and command.config.multimodal):
        return None
    try:
        return open_reader(Path(command.model_dir), model.module, model.tokenizer)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise AttemptEnded(
            stage="loading",
            code="processor_not_loaded",
            message=f"The model's processor cannot be loaded: {first_line(error)}",
            error_type=type(error).__name__,
        ) from error


def _load_whole(folder: Path, kind: GenericModelKind | None, device: torch.device, *, stays_packed: bool) -> PreTrainedModel:
    """All of the model on the device; packed weights are brought there by their library, which may not let them be moved."""
    if stays_packed:
        module = load_checkpoint(folder, kind, device_map={"": str(device)})
    else:
        module = load_checkpoint(folder, kind)
        nn.Module.to(module, device)
    storages = [tensor.untyped_storage() for tensor in (*module.parameters(), *module.buffers()) if tensor.device.type == "cpu"]
    let_go_of_pages(tuple(folder.glob("*.safetensors")), [(storage.data_ptr(), storage.nbytes()) for storage in storages])
    module.train(mode=False).requires_grad_(requires_grad=False)
    return module


def _tokenizer(folder: Path, family: NativeFamily | None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, the same whether or not mistral-common happens to be installed."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=False, local_files_only=True, mistral_format=False
    )
    if family is NativeFamily.VOXTRAL and tokenizer.chat_template is None:
        tokenizer.chat_template = VOXTRAL_TEMPLATE
    return tokenizer


def _refuse_other_kinds(command: Execute) -> None:
    kind = command.runtime_plan.generic_model_kind
    if kind is not None or command.profile.family is NativeFamily.VOXTRAL:
        return
    raise AttemptEnded(
        stage="loading",
        code="kind_not_supported",
        message="The model is of no kind that this runner loads, and of no family that it knows.",
        error_type="UnsupportedKind",
        is_permanent=True,
    )


def _keep_the_head_small(module: PreTrainedModel) -> None:
    """Give the head a copy of its input: for a strided slice torch would copy the whole vocabulary matrix once a row.

    `contiguous()` would not do: of a lone row it keeps the slice's strides, for which the matrix is copied in bfloat16.
    """
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    if head is not None:
        head.register_forward_pre_hook(_with_plain_input)


def _with_plain_input(_module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (arguments[0].clone(memory_format=torch.contiguous_format), *arguments[1:])


def _context_limit(module: PreTrainedModel, profiled: int | None) -> int | None:
    configured = getattr(module.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return min((limit for limit in (profiled, configured) if limit), default=None)


def _end_tokens(module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured: Any = getattr(module.generation_config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    listed = configured if isinstance(configured, list | tuple) else [configured]
    return frozenset(token for token in listed if token is not None)


def _pad_token(tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]) -> int:
    """Any valid token will do: padding is masked."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else min(end_tokens, default=0)
