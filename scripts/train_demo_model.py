"""How was the demo model made? Trains a small Llama to add two numbers below 100, with a seed, on the CPU.

Run `python scripts/train_demo_model.py`. It writes `demo/models/sum-chat` (float32 safetensors, tokenizer, chat template)
and `demo/heldout.jsonl`, 200 questions whose pairs of numbers were never trained on, with their answers in
`demo/heldout_answers.json`, and prints the share answered right.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<|user|>", "<|assistant|>")
CHARACTERS = "\n" + "".join(chr(code) for code in range(32, 127))
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only the roles user and assistant are known') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# How a question may be put; those with the user's marker are what the chat template makes of a message.
QUESTION_FORMS = (
    "<s>{a}+{b}=",
    "<s><|user|>{a}+{b}<|assistant|>",
    "<s><|user|>What is {a}+{b}?<|assistant|>",
)
FORM_WEIGHTS = (3, 3, 4)
# Numbers below ten are few, and would be learnt last: their pairs come up so many times as often as others.
SMALL_NUMBER_WEIGHT = 3
HELDOUT_COUNT = 200
IGNORED_LABEL = -100

Pair = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What determines the weights: equal recipes on equal software give equal models."""

    seed: int = 20
    steps: int = 1400
    first_form_steps: int = 500
    batch_size: int = 256
    learning_rate: float = 3e-3
    threads: int = 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every printable ASCII character is a token; a raw prompt gets `<s>` in front."""
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary["<s>"])]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """About 0.6 million parameters: 3 layers of width 128. Rotary positions make the long context free of cost."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def split_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """All pairs of numbers below 100, as (to train on, held out); the split depends on the seed alone."""
    pairs = [(a, b) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(pairs)
    return pairs[HELDOUT_COUNT:], pairs[:HELDOUT_COUNT]


def batches(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (token ids, labels), both [B, T], right-padded; only the answer and its end are learnt.

    All questions of a batch have one form, so that little of it is padding. The shortest form comes first, alone: addition is
    understood soonest in one form, and carried over to the others quickly.
    """
    rng = random.Random(recipe.seed)
    weights = list(itertools.accumulate(SMALL_NUMBER_WEIGHT if min(pair) < 10 else 1 for pair in pairs))
    for step in itertools.count():
        form = QUESTION_FORMS[0] if step < recipe.first_form_steps else rng.choices(QUESTION_FORMS, FORM_WEIGHTS)[0]
        examples = []
        for a, b in rng.choices(pairs, cum_weights=weights, k=recipe.batch_size):
            question = tokenizer.encode(form.format(a=a, b=b), add_special_tokens=False)
            answer = tokenizer.encode(f"{a + b}</s>", add_special_tokens=False)
            examples.append((question, answer))
        width = max(len(question) + len(answer) for question, answer in examples)
        tokens = torch.full((len(examples), width), int(tokenizer.pad_token_id))
        labels = torch.full((len(examples), width), IGNORED_LABEL)
        for index, (question, answer) in enumerate(examples):
            end = len(question) + len(answer)
            tokens[index, :end] = torch.tensor(question + answer)
            labels[index, len(question) : end] = torch.tensor(answer)
        yield tokens, labels


def train(model: LlamaForCausalLM, pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> None:
    """Adam with a short warm-up and a cosine decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    warm_up = max(1, min(100, recipe.steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps))),
    )
    model.train()
    started = time.monotonic()
    for step, (tokens, labels) in zip(range(1, recipe.steps + 1), batches(pairs, tokenizer, recipe), strict=False):
        loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s", flush=True)
    model.train(mode=False)


def heldout_rows(pairs: Sequence[Pair]) -> list[dict[str, object]]:
    """Half of the questions as raw prompts, half as messages: lines that `ollm-service submit` takes as they are."""
    rows: list[dict[str, object]] = []
    for index, (a, b) in enumerate(pairs):
        row: dict[str, object] = {"custom_id": _custom_id(index)}
        if index % 2 == 0:
            row["prompt"] = f"{a}+{b}="
        else:
            content = f"{a}+{b}" if index % 4 == 1 else f"What is {a}+{b}?"
            row["messages"] = [{"role": "user", "content": content}]
        rows.append(row)
    return rows


def heldout_answers(pairs: Sequence[Pair]) -> dict[str, str]:
    """The right answer to each of them, by its `custom_id`."""
    return {_custom_id(index): str(a + b) for index, (a, b) in enumerate(pairs)}


def _custom_id(index: int) -> str:
    return f"heldout-{index:03d}"


def share_right(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], form: str) -> float:
    """The share of pairs for which greedy generation gives the sum and then ends."""
    questions = [form.format(a=a, b=b) for a, b in pairs]
    inputs = tokenizer(questions, add_special_tokens=False, padding=True, return_tensors="pt")
    # transformers types `generate` for a protocol that its own models do not satisfy.
    generator: Any = model
    inputs.pop("token_type_ids", None)
    with torch.inference_mode():
        output = generator.generate(**inputs, max_new_tokens=6, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=False)
    right = sum(answer.split("<pad>")[0] == f"{a + b}</s>" for answer, (a, b) in zip(answers, pairs, strict=True))
    return right / len(pairs)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights as float32 safetensors, `tokenizer.json`, the chat template and greedy generation defaults."""
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Train, save, write the held-out questions and print how many are answered right."""
    defaults = Recipe()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=ROOT / "demo" / "models" / "sum-chat")
    parser.add_argument("--heldout", type=Path, default=ROOT / "demo" / "heldout.jsonl")
    parser.add_argument("--answers", type=Path, default=ROOT / "demo" / "heldout_answers.json")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--threads", type=int, default=defaults.threads, help="one is faster on a busy machine")
    arguments = parser.parse_args()
    recipe = Recipe(seed=arguments.seed, steps=arguments.steps, threads=arguments.threads)

    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train_pairs, heldout_pairs = split_pairs(recipe.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train_pairs)} pairs to train on")
    train(model, train_pairs, tokenizer, recipe)
    save(model, tokenizer, arguments.out)
    arguments.heldout.write_text("".join(json.dumps(row) + "\n" for row in heldout_rows(heldout_pairs)), encoding="utf-8")
    arguments.answers.write_text(json.dumps(heldout_answers(heldout_pairs), indent=0) + "\n", encoding="utf-8")
    for form in QUESTION_FORMS:
        print(f"held-out answered right, {form!r}: {share_right(model, tokenizer, heldout_pairs, form):.1%}")


if __name__ == "__main__":
    main()
