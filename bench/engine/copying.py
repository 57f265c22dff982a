"""Which task repeats parts of its prompt, and who can do it? A text is written again with its capitals made small.

One word in eight is a capital, so that the answer follows the prompt for some words and then differs, as where names or spelling
are corrected. A Llama of two layers learns it in a minute or two from random texts; deepened, it answers the same and has to be
streamed.
"""

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scripts.deepen_demo_model import deepen

WORDS, CAPITALS = 96, 1 / 8
SPECIAL = ("<pad>", "<text>", "<answer>", "<end>")
TEXT_TOKENS = 60
STEPS, ROWS, RATE = 3000, 48, 3e-3
# Below the first mean loss the rate falls, below the second the task is learnt: that comes all at once, after hundreds of steps.
NEARLY, LEARNT = 0.5, 0.02
IGNORED = -100


def copying_row(seed: int, length: int = TEXT_TOKENS) -> tuple[str, str]:
    """A prompt and its right answer; of each word the text has one at most."""
    text, answer = _example(random.Random(f"held out {seed}"), length)
    return " ".join(("<text>", *text, "<answer>")), " ".join(answer)


def _example(chance: random.Random, length: int) -> tuple[list[str], list[str]]:
    numbers = chance.sample(range(WORDS), length)
    text = [f"W{number}" if chance.random() < CAPITALS else f"w{number}" for number in numbers]
    return text, [word.lower() for word in text]


def make_copying_tokenizer() -> PreTrainedTokenizerFast:
    """Every word is a token."""
    names = [*SPECIAL, *(f"{letter}{number}" for letter in "wW" for number in range(WORDS))]
    tokenizer = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left", model_max_length=512
    )


def make_copying_model(folder: Path, *, layers: int, width: int) -> None:
    """Train the small model and save it with so many layers of such a width. Raises SystemExit where it has not learnt enough."""
    tokenizer = make_copying_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=SPECIAL.index("<end>"),
        )
    )
    loss = train(model, tokenizer)
    if loss > 0.1:
        raise SystemExit(f"the copying model has not learnt its task (loss {loss:.2f}): train it for more than {STEPS} steps")
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        eos_token_id=SPECIAL.index("<end>"), pad_token_id=0
    )
    with tempfile.TemporaryDirectory() as small:
        model.save_pretrained(small)
        tokenizer.save_pretrained(small)
        deepen(folder, layers=layers, width=width, source_folder=Path(small))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """Texts grow from 8 words to as many as are asked later. Returns the mean loss of the last steps.

    With one thread: the work of a step is small, and on a busy machine several wait for each other.
    """
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    chance, began, losses = random.Random(0), time.monotonic(), [10.0]
    nearly_at: int | None = None
    for step in range(1, STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 50) * (1.0 if nearly_at is None else 0.99 ** (step - nearly_at))
        longest = min(TEXT_TOKENS, 8 + step // 10)
        tokens, labels = _batch(chance, tokenizer, chance.randint(min(20 if step > 500 else 4, longest), longest))
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
        newest = sum(losses[-20:]) / 20
        if newest < NEARLY and nearly_at is None and step > 20:
            nearly_at = step
        if newest < LEARNT and 8 + step // 10 >= TEXT_TOKENS:
            break
        if step % 100 == 0:
            print(f"copying: step {step}, loss {losses[-1]:.3f}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return sum(losses[-20:]) / 20


def _batch(chance: random.Random, tokenizer: Any, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels, both [rows, tokens], of texts of one length; only the answer and its end are learnt."""
    tokens, labels = [], []
    for _ in range(ROWS):
        text, answer = _example(chance, length)
        question = tokenizer.convert_tokens_to_ids(["<text>", *text, "<answer>"])
        wanted = tokenizer.convert_tokens_to_ids([*answer, "<end>"])
        tokens.append(question + wanted)
        labels.append([IGNORED] * len(question) + wanted)
    return torch.tensor(tokens), torch.tensor(labels)
