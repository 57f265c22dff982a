"""What does a draft model guess, and what does it remember of wrong guesses? Compared with the same model asked from scratch."""

import random
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.runner.forcing import loaded
from workers.runner.packed.draft import DraftModel


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_guesses_are_the_best_tokens_after_what_is_certain(families: Callable[[str], Path], family: str) -> None:
    """Whatever of earlier guesses was right, and whoever else is asked for: the greedy continuation of each text."""
    folder, chance = families(family), random.Random(1)
    draft = DraftModel(loaded(folder), torch.device("cpu"))
    texts = {key: [chance.randrange(5, 90) for _ in range(length)] for key, length in (("a", 30), ("b", 3), ("c", 17))}
    with draft.attached():
        for _ in range(6):
            asked: dict[Hashable, list[int]] = {key: text for key, text in texts.items() if chance.random() < 0.8}
            found = draft.guess(asked, 3)
            assert found == {key: greedy(folder, text, 3) for key, text in asked.items()}
            for key in [key for key in texts if key in asked]:
                right = chance.randrange(4)
                texts[key] = [*texts[key], *found[key][:right], chance.randrange(5, 90)]
        draft.forget("a")
        assert draft.guess({"a": texts["b"]}, 2) == {"a": greedy(folder, texts["b"], 2)}


@torch.inference_mode()
def greedy(folder: Path, text: list[int], count: int) -> list[int]:
    """What plain transformers goes on with."""
    tokens = torch.tensor([text])
    for _ in range(count):
        best = plain(folder)(input_ids=tokens, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        tokens = torch.cat([tokens, best], dim=-1)
    return [int(token) for token in tokens[0, len(text) :]]


@cache
def plain(folder: Path) -> Any:
    """The model once more, which no pack has."""
    return AutoModelForCausalLM.from_pretrained(folder)
