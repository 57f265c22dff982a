"""Which models of images and sounds do the tests use, and which images and sounds? Small ones, all made here."""

import base64
import io
import json
import math
import struct
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
    WhisperFeatureExtractor,
)

from scripts.train_demo_model import make_tokenizer

RATE = 16_000
CONTEXT = 1024
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'audio' %}[AUDIO]{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SPREAD = 0.3
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "initializer_range": _SPREAD,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,  # more than the decoder has
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "initializer_range": _SPREAD,
}
_MEL_BANDS, _POSITIONS = 8, 16
_AUDIO: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_mel_bins": _MEL_BANDS,
    "max_source_positions": _POSITIONS,
    "initializer_range": _SPREAD,
}


def image_bytes(shade: int, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    """A picture with a gradient that depends on the shade."""
    image = Image.new("RGB", size)
    image.putdata([((x * shade) % 256, (y * 7 + shade) % 256, (x * y) % 256) for y in range(size[1]) for x in range(size[0])])
    held = io.BytesIO()
    image.save(held, kind)
    return held.getvalue()


def image_part(data: bytes, kind: str = "png") -> dict[str, Any]:
    """A part of a message with an image, as users send it."""
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{base64.b64encode(data).decode()}"}}


def sound_bytes(pitch: float, seconds: float = 0.2, *, rate: int = RATE, width: int = 2, channels: int = 1) -> bytes:
    """A WAV file with one tone."""
    held = io.BytesIO()
    with wave.open(held, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        for index in range(int(seconds * rate)):
            value = math.sin(2 * math.pi * pitch * index / rate) * 0.5
            whole = int(value * ((1 << (8 * width - 1)) - 1))
            sample = struct.pack("<B", whole + 128) if width == 1 else whole.to_bytes(width, "little", signed=True)
            file.writeframes(sample * channels)
    return held.getvalue()


def sound_part(data: bytes) -> dict[str, Any]:
    """A part of a message with a sound, as users send it."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": "wav"}}


def text_part(text: str) -> dict[str, Any]:
    """A part of a message with text."""
    return {"type": "text", "text": text}


def _tokenizer(mark: str, **named: str) -> Any:
    """Characters are tokens, and so is each named one; `mark` stands for an image in the template."""
    plain = make_tokenizer()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        tokenizer_object=plain.backend_tokenizer,
        pad_token=plain.pad_token,
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        unk_token=plain.unk_token,
        extra_special_tokens=named,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
        chat_template=TEMPLATE.replace("IMAGE", mark),
    )


def _tokens(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():
        model.get_output_embeddings().weight[never_answered(tokenizer)] = 0
    model.to(dtype).save_pretrained(folder)


def never_answered(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens whose text does not come back as one character: marks, and white space, which some tokenizers leave out."""
    return sorted(number for text, number in tokenizer.get_vocab().items() if len(text) != 1 or text.isspace())


def save_gemma3(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A Gemma 3 that sees: an image takes four tokens, which see each other."""
    tokenizer = _tokenizer(
        "<start_of_image>",
        boi_token="<start_of_image>",
        image_token="<image_soft_token>",
        eoi_token="<end_of_image>",
    )
    ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("start_of_image", "image_soft_token", "end_of_image")}
    torch.manual_seed(seed)
    config = Gemma3Config(
        text_config={**_TEXT, **_tokens(tokenizer), "sliding_window": 16, "sliding_window_pattern": 2},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        boi_token_index=ids["start_of_image"],
        image_token_index=ids["image_soft_token"],
        eoi_token_index=ids["end_of_image"],
        initializer_range=_SPREAD,
        tie_word_embeddings=False,
    )
    model: Any = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=1.0)
    _save(model, tokenizer, folder, dtype)
    images = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    Gemma3Processor(images, tokenizer, chat_template=tokenizer.chat_template, image_seq_length=4).save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    """A LLaVA, which has no native family: an image takes as many tokens as it has patches."""
    tokenizer = _tokenizer("<image>", image_token="<image>")
    torch.manual_seed(1)
    config = LlavaConfig(
        text_config=LlamaConfig(**_TEXT, **_tokens(tokenizer)),
        vision_config=CLIPVisionConfig(**_VISION),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model: Any = LlavaForConditionalGeneration(config)
    _save(model, tokenizer, folder)
    processor: Any = LlavaProcessor(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=tokenizer.chat_template,
    )
    processor.save_pretrained(folder)
    return folder


# The first tokens of every tekken.json for instructions and sounds, by number; those that the tests do not name have any name.
_TEKKEN_MARKS: Mapping[int, str] = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    11: "<pad>",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    24: "[AUDIO]",
    25: "[BEGIN_AUDIO]",
}
TEKKEN_FIRST_BYTE = 64


def save_tekken_voxtral(folder: Path) -> Path:
    """A Voxtral as its makers publish it: tokens in a tekken.json, here one for each byte, and no chat template."""
    numbers: dict[str, Any] = {"vocab_size": TEKKEN_FIRST_BYTE + 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 11}
    torch.manual_seed(3)
    config = VoxtralConfig(text_config={"model_type": "llama", **_TEXT, **numbers}, audio_config=_AUDIO, audio_token_id=24)
    model: Any = VoxtralForConditionalGeneration(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        eos_token_id=2, pad_token_id=11
    )
    model.save_pretrained(folder)
    WhisperFeatureExtractor(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        feature_size=_MEL_BANDS, sampling_rate=RATE
    ).save_pretrained(folder)
    marks = [_TEKKEN_MARKS.get(number, f"<SPECIAL_{number}>") for number in range(TEKKEN_FIRST_BYTE)]
    tekken = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?[\p{L}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "num_vocab_tokens": 256,
            "default_vocab_size": TEKKEN_FIRST_BYTE + 256,
            "default_num_special_tokens": TEKKEN_FIRST_BYTE,
            "version": "v7",
        },
        "vocab": [
            {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None} for byte in range(256)
        ],
        "special_tokens": [{"rank": number, "token_str": mark, "is_control": True} for number, mark in enumerate(marks)],
    }
    (folder / "tekken.json").write_text(json.dumps(tekken), encoding="utf-8")
    return folder


def save_voxtral(folder: Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A Voxtral that hears: a chunk of sound takes four tokens."""
    tokenizer = _tokenizer("", audio_token="[AUDIO]")
    torch.manual_seed(2 + seed)
    config = VoxtralConfig(
        text_config={"model_type": "llama", **_TEXT, **_tokens(tokenizer)},
        audio_config=_AUDIO,
        audio_token_id=tokenizer.convert_tokens_to_ids("[AUDIO]"),
    )
    _save(VoxtralForConditionalGeneration(config), tokenizer, folder, dtype)
    tokenizer.save_pretrained(folder)
    extractor: Any = WhisperFeatureExtractor(  # type: ignore[no-untyped-call]  # transformers does not annotate it
        feature_size=_MEL_BANDS, sampling_rate=RATE
    )
    extractor.save_pretrained(folder)
    return folder
