"""How is a draft model brought into memory beside the model for which it guesses? Whole, if it reads the same tokens."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ollm_service.core.packing import PACKED_MODELS
from ollm_service.core.plan import GenericModelKind
from workers.runner.interruptions import AttemptEnded
from workers.runner.weights.checkpoint import load_checkpoint


def load_draft(folder: Path, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> PreTrainedModel:
    """The draft on the device.

    Raises AttemptEnded where its tokenizer is another or it cannot run in packs; OSError, and what transformers raises for a
    checkpoint that it cannot load.
    """
    own = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, mistral_format=False)
    if own.get_vocab() != tokenizer.get_vocab():
        raise _unusable(
            "draft_tokenizer_differs",
            f"The draft model {folder.name} has another tokenizer, so its guesses would be other tokens. Name one of the same.",
        )
    module = load_checkpoint(folder, GenericModelKind.CAUSAL_LM)
    if module.config.model_type not in PACKED_MODELS:
        kinds = ", ".join(sorted(PACKED_MODELS))
        raise _unusable("draft_not_usable", f"A draft model is one of {kinds}, not {module.config.model_type}.")
    nn.Module.to(module, device)
    module.train(mode=False).requires_grad_(requires_grad=False)
    return module


def _unusable(code: str, message: str) -> AttemptEnded:
    return AttemptEnded(stage="loading", code=code, message=message, error_type="UnusableDraft", is_permanent=True)
