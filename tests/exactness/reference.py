"""What does plain transformers answer? `generate`, greedily, for one prompt alone. Nothing is computed twice.

N new tokens, V vocabulary.
"""

import random
import string
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMultimodalLM, AutoTokenizer

from tests.runner.media_answers import Content, inputs_of


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A message with images or sounds. Equal to itself alone."""

    content: Content


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainAnswer:
    """What follows a prompt: the text, whose characters are the tokens, and the logits [N, V] that each was chosen by."""

    text: str
    logits: Tensor

    @property
    def smallest_margin(self) -> float:
        """By how much the chosen logit beat the second best, at the least clear of the tokens, in their standard deviation."""
        best = self.logits.topk(2).values
        return float((best[:, 0] - best[:, 1]).min() / self.logits.std())


@cache
def plain_answer(folder: Path, prompt: str | Shown, new_tokens: int, dtype: torch.dtype | None = None) -> PlainAnswer:
    """The model's own answer, in its checkpoint's type unless another is given."""
    model, tokenizer = _loaded(folder, dtype)
    inputs = _text_inputs(tokenizer, prompt) if isinstance(prompt, str) else inputs_of(folder, prompt.content)
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
    return PlainAnswer(text=str(tokenizer.decode(tokens)), logits=torch.cat(output.logits).float())


@cache
def _loaded(folder: Path, dtype: torch.dtype | None) -> tuple[Any, Any]:
    has_media = {"vision_config", "audio_config"} & AutoConfig.from_pretrained(folder).to_dict().keys()
    architecture = AutoModelForMultimodalLM if has_media else AutoModelForCausalLM
    model: Any = architecture.from_pretrained(folder, dtype=dtype or "auto")
    return model, AutoTokenizer.from_pretrained(folder)


def _text_inputs(tokenizer: Any, prompt: str) -> dict[str, Tensor]:
    inputs = tokenizer(prompt, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def some_text(length: int, seed: int) -> str:
    """Text of so many characters, and as many tokens, that no model has a habit about."""
    return "".join(random.Random(seed).choices(string.ascii_letters + string.digits + string.punctuation, k=length))


@cache
def forced_logits(folder: Path, prompt: str, answer: str, dtype: torch.dtype) -> Tensor:
    """Logits [N, V] by which each token of the answer would be chosen after those before it, computed in the given type."""
    model, tokenizer = _loaded(folder, dtype)
    tokens = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=tokens).logits[0, -len(answer) - 1 : -1].float()
    return logits


def token_ids(folder: Path, text: str) -> list[int]:
    """The tokens of a text in the midst of others."""
    _, tokenizer = _loaded(folder, None)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
