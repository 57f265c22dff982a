"""Which parts may a message's content have, besides text? Images and sounds as bytes, in the shapes of OpenAI's chat API.

Nothing is ever fetched: a part that names a place instead of bringing its bytes is wrong. Whether the bytes are an image or a
sound shows only to whoever decodes them.
"""

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ollm_service.core.errors import shown
from ollm_service.core.plan import ModelModality

IMAGE_PART, SOUND_PART = "image_url", "input_audio"
IMAGE_TYPES = ("image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp")
SOUND_FORMATS = ("wav",)
MOST_PART_BYTES = 20 * 1024**2
MOST_PARTS = 64  # images and sounds of one row
# What one of them may become; a processor that makes more of it is told to be given less.
MOST_IMAGE_TOKENS = 4_096
_SOUND_TOKENS_PER_SECOND, _LEAST_SOUND_BYTES_PER_SECOND, _SOUND_CHUNK_SECONDS = 12.5, 16_000, 30
_DATA_URL = re.compile(r"data:([a-z]+/[a-z0-9.+-]+);base64,", re.IGNORECASE)


class WrongPart(ValueError):
    """A part that cannot be taken; the message says why and what to do, and quotes nothing of the content."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(frozen=True, slots=True, kw_only=True)
class Medium:
    """An image or a sound as it came: its bytes are still whatever the sender says."""

    modality: ModelModality
    data: bytes


def medium_of(part: Mapping[str, Any]) -> Medium:
    """The bytes of a part that is not text. Raises WrongPart."""
    match part.get("type"):
        case "image_url":
            return Medium(modality=ModelModality.IMAGE, data=_image_bytes(part.get(IMAGE_PART)))
        case "input_audio":
            return Medium(modality=ModelModality.AUDIO, data=_sound_bytes(part.get(SOUND_PART)))
        case other:
            known = f"send parts of type `text`, `{IMAGE_PART}` or `{SOUND_PART}`"
            raise WrongPart("unsupported_content", f"A part of type `{shown(other)}` is not supported; {known}.")


def kept_part(part: Mapping[str, Any]) -> dict[str, Any]:
    """The part with nothing but what is used of it. Raises WrongPart."""
    medium_of(part)
    if part["type"] == IMAGE_PART:
        return {"type": IMAGE_PART, IMAGE_PART: {"url": _inner(part[IMAGE_PART], "url")}}
    return {"type": SOUND_PART, SOUND_PART: {"data": _inner(part[SOUND_PART], "data"), "format": SOUND_FORMATS[0]}}


def media_parts(messages: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of stored messages that are not text, in their order."""
    for message in messages or ():
        content = message.get("content")
        if isinstance(content, list | tuple):
            yield from (part for part in content if isinstance(part, Mapping) and part.get("type") != "text")


def modalities_of(messages: Any) -> frozenset[ModelModality]:
    """What stored messages bring besides text."""
    named = {IMAGE_PART: ModelModality.IMAGE, SOUND_PART: ModelModality.AUDIO}
    return frozenset(named[part["type"]] for part in media_parts(messages) if part.get("type") in named)


def most_tokens_of_part(part: Mapping[str, Any], image_tokens: int = MOST_IMAGE_TOKENS) -> int:
    """A bound on the tokens that a kept part becomes: a sound has at least a byte for each of 16,000 samples a second."""
    if part.get("type") == IMAGE_PART:
        return image_tokens
    size = len(_inner(part.get(SOUND_PART), "data")) * 3 // 4
    chunks = size // (_LEAST_SOUND_BYTES_PER_SECOND * _SOUND_CHUNK_SECONDS) + 1
    return round(chunks * _SOUND_CHUNK_SECONDS * _SOUND_TOKENS_PER_SECOND) + 16


def _image_bytes(image: Any) -> bytes:
    url = image if isinstance(image, str) else _inner(image, "url")
    if not url:
        raise WrongPart("invalid_content", f"A part of type `{IMAGE_PART}` needs {IMAGE_PART}.url.")
    found = _DATA_URL.match(url)
    if found is None:
        raise WrongPart(
            "unsupported_content",
            "Addresses of images are never fetched: send the bytes as a data URL, data:image/png;base64,….",
        )
    if found[1].lower() not in IMAGE_TYPES:
        raise WrongPart(
            "unsupported_content", f"Images of type {shown(found[1])} are not supported; send one of {', '.join(IMAGE_TYPES)}."
        )
    return _decoded(url[found.end() :], "image")


def _sound_bytes(sound: Any) -> bytes:
    named = sound.get("format") if isinstance(sound, Mapping) else None
    if named not in SOUND_FORMATS:
        raise WrongPart("unsupported_content", f"Sounds of format `{shown(named)}` are not supported; send wav.")
    return _decoded(_inner(sound, "data"), "sound")


def _decoded(text: str, what: str) -> bytes:
    if len(text) * 3 // 4 > MOST_PART_BYTES:
        raise WrongPart("content_too_large", f"The {what} has more than {MOST_PART_BYTES:,} bytes; send a smaller one.")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise WrongPart("invalid_content", f"The {what} is not base64; encode its bytes as standard base64.") from error
    if not data:
        raise WrongPart("invalid_content", f"The {what} is empty.")
    return data


def _inner(holder: Any, name: str) -> str:
    value = holder.get(name) if isinstance(holder, Mapping) else None
    return value if isinstance(value, str) else ""
