"""What are models of images and sounds asked in tests, and what does plain transformers answer?"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMultimodalLM, AutoProcessor, AutoTokenizer, WhisperFeatureExtractor

from tests.runner.media_models import (
    RATE,
    image_bytes,
    image_part,
    save_gemma3,
    save_llava,
    save_voxtral,
    sound_bytes,
    sound_part,
    text_part,
)
from workers.runner.media.images import decode_image
from workers.runner.media.sounds import decode_sound

NEW_TOKENS = 8
MAKERS: Mapping[str, Callable[[Path], Path]] = {"gemma3": save_gemma3, "llava": save_llava, "voxtral": save_voxtral}
Content = list[dict[str, Any]]
IMAGES: Mapping[int, bytes] = {shade: image_bytes(shade) for shade in (3, 50, 90)}
PICTURES: Sequence[Content] = (
    [image_part(IMAGES[3]), text_part("what?")],
    [image_part(IMAGES[50]), text_part("what?")],
    [text_part("left "), image_part(IMAGES[3]), text_part(" right "), image_part(IMAGES[90]), text_part(" which?")],
    [text_part("no image at all")],
)
ALL_SOUNDS = (sound_bytes(300), sound_bytes(2_000), sound_bytes(300, 0.5), sound_bytes(900))
SOUNDS: Sequence[Content] = (
    [sound_part(ALL_SOUNDS[0]), text_part("what?")],
    [sound_part(ALL_SOUNDS[1]), text_part("what?")],
    [text_part("first "), sound_part(ALL_SOUNDS[2]), sound_part(ALL_SOUNDS[3]), text_part(" which?")],
    [text_part("no sound at all")],
)


def contents_of(name: str) -> Sequence[Content]:
    """What is asked of a model."""
    return SOUNDS if name == "voxtral" else PICTURES


def plain(root: Path, name: str, content: Content) -> str:
    """What transformers itself generates for one message alone, greedily, with the processor's files of the model."""
    folder = root / name
    inputs = inputs_of(folder, content)
    model: Any = AutoModelForMultimodalLM.from_pretrained(folder)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def inputs_of(folder: Path, content: Content) -> dict[str, Any]:
    """A message as the model's forward pass takes it. What has a processor sees; what has none, hears."""
    return seen(folder, content) if (folder / "processor_config.json").is_file() else heard(folder, content)


def seen(folder: Path, content: Content) -> dict[str, Any]:
    """A message with images through the model's processor."""
    processor: Any = AutoProcessor.from_pretrained(folder)  # type: ignore[no-untyped-call]  # not annotated
    images = iter([decode_image(IMAGES[shade]) for shade in shades_in(content)])
    shown = [part if part["type"] == "text" else {"type": "image", "image": next(images)} for part in content]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": shown}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def shades_in(content: Content) -> list[int]:
    """Which images a message brings."""
    by_part = {image_part(data)["image_url"]["url"]: shade for shade, data in IMAGES.items()}
    return [by_part[part["image_url"]["url"]] for part in content if part["type"] == "image_url"]


def heard(folder: Path, content: Content) -> dict[str, Any]:
    """A message with sounds: each is silence up to whole chunks of 32 features, which become 4 tokens a chunk."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    extractor: Any = WhisperFeatureExtractor.from_pretrained(folder)
    chunks, text = [], "<s><|user|>"
    by_sound = {sound_part(data)["input_audio"]["data"]: data for data in ALL_SOUNDS}
    for part in content:
        if part["type"] == "text":
            text += part["text"]
            continue
        samples = decode_sound(by_sound[part["input_audio"]["data"]], RATE)
        whole = -(-len(samples) // (32 * 160)) * 32 * 160
        padded = torch.nn.functional.pad(torch.tensor(samples), (0, whole - len(samples)))
        features = extractor(padded.numpy(), sampling_rate=RATE, padding=False, truncation=False, return_tensors="pt")
        found = features["input_features"][0].split(32, dim=-1)
        chunks += found
        text += "[AUDIO]" * 4 * len(found)
    inputs = tokenizer(text + "<|assistant|>", add_special_tokens=False, return_tensors="pt")
    extra = {"input_features": torch.stack(chunks)} if chunks else {}
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], **extra}
