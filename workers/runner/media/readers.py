"""How do messages with images or sounds become tokens, and what else is the model fed? By the files of its own processor.

A reader puts as many placeholder tokens into the row as the model will put features in their place.
F features of a sound in time, M mel bands, C chunks of all sounds of a row.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ollm_service.core.content import WrongPart, medium_of
from ollm_service.core.plan import ModelModality
from workers.runner.media.feeding import placeholder_of
from workers.runner.media.sounds import decode_sound
from workers.runner.memory import is_out_of_memory
from workers.runner.prompts import ReadsMedia, RowRefused

_LOCAL: Mapping[str, Any] = {"trust_remote_code": False, "local_files_only": True}
Read = tuple[list[int], dict[str, Tensor]]


def open_reader(folder: Path, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ReadsMedia:
    """The reader for this model. Raises OSError and ValueError for a broken processor, ImportError where pillow is missing."""
    if getattr(module.config, "audio_config", None) is not None:
        return SoundReader(folder, module, tokenizer)
    return ImageReader(folder, placeholder_of(module))


class ImageReader:
    """Images, through the model's processor and its chat template. No text may have the token that stands for an image."""

    def __init__(self, folder: Path, placeholder: int | None) -> None:
        self._placeholder = placeholder
        decode: Any = importlib.import_module("workers.runner.media.images").decode_image
        self._decode: Callable[[bytes], Any] = decode
        self._processor: Any = AutoProcessor.from_pretrained(  # type: ignore[no-untyped-call]  # transformers does not annotate it
            folder, **_LOCAL
        )

    def read(self, messages: Sequence[Mapping[str, Any]]) -> Read:
        """The processor's tokens and tensors, `pixel_values` among them."""
        shown = [{**message, "content": self._parts(message.get("content"))} for message in messages]
        try:
            found = self._processor.apply_chat_template(
                shown, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise _refused(error) from error
        tensors = {name: value for name, value in found.items() if isinstance(value, Tensor) and name != "attention_mask"}
        return tensors.pop("input_ids")[0].tolist(), tensors

    def _parts(self, content: Any) -> list[Mapping[str, Any]]:
        return [
            {"type": "image", "image": self._decode(_bytes_of(part, ModelModality.IMAGE))}
            if part.get("type") != "text"
            else self._plain(part)
            for part in as_parts(content)
        ]

    def _plain(self, part: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of text. Raises RowRefused where it poses as an image: the features of others would go astray."""
        tokens = self._processor.tokenizer(str(part.get("text")), add_special_tokens=False, verbose=False)["input_ids"]
        if self._placeholder in tokens:
            raise RowRefused("invalid_messages", "A text has the model's own mark for an image; leave it out of the text.")
        return part


class SoundReader:
    """Sounds, as Voxtral hears them: in whole chunks, each of which takes the same number of tokens."""

    def __init__(self, folder: Path, module: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        audio = module.config.audio_config
        self._tokenizer = tokenizer
        self._extractor: Any = AutoFeatureExtractor.from_pretrained(  # type: ignore[no-untyped-call]  # transformers does not annotate it
            folder, **_LOCAL
        )
        self._token: int = module.config.audio_token_id
        self._chunk_features = 2 * audio.max_source_positions  # the encoder's second convolution halves them
        self._chunk_tokens = audio.max_source_positions * audio.hidden_size // audio.intermediate_size

    def read(self, messages: Sequence[Mapping[str, Any]]) -> Read:
        """The tokens, with a placeholder for each feature that the model will put there, and `input_features` [C, M, F]."""
        sounds = [
            self._features(_bytes_of(part, ModelModality.AUDIO))
            for message in messages
            for part in as_parts(message.get("content"))
            if part.get("type") != "text"
        ]
        shown = [{**message, "content": [_as_heard(part) for part in as_parts(message.get("content"))]} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(shown, tokenize=False, add_generation_prompt=True)
            marked: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise _refused(error) from error
        if marked.count(self._token) != len(sounds):
            raise RowRefused(
                "invalid_messages", "The model's chat template does not show each sound once; the text may not mark one."
            )
        lengths = iter([chunks.shape[0] * self._chunk_tokens for chunks in sounds])
        tokens = [copy for token in marked for copy in [token] * (next(lengths) if token == self._token else 1)]
        return tokens, {"input_features": torch.cat(sounds)}

    def _features(self, data: bytes) -> Tensor:
        """A sound's features [C, M, F], silence behind it up to a whole chunk."""
        rate: int = self._extractor.sampling_rate
        found = self._extractor(
            decode_sound(data, rate),
            sampling_rate=rate,
            padding=True,
            truncation=False,
            pad_to_multiple_of=self._chunk_features * self._extractor.hop_length,
            return_tensors="pt",
        )
        features_MF: Tensor = found["input_features"][0]
        return features_MF.reshape(features_MF.shape[0], -1, self._chunk_features).transpose(0, 1)


def as_parts(content: Any) -> list[Mapping[str, Any]]:
    """A message's content as a list of parts. Raises RowRefused for anything else."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        raise RowRefused("invalid_messages", "A message has no content.")
    return list(content)


def _bytes_of(part: Mapping[str, Any], wanted: ModelModality) -> bytes:
    try:
        medium = medium_of(part)
    except WrongPart as wrong:
        raise RowRefused(wrong.code, wrong.message) from wrong
    if medium.modality is not wanted:
        raise RowRefused("unsupported_content", f"This model takes text and {wanted}, no {medium.modality}.")
    return medium.data


def _as_heard(part: Mapping[str, Any]) -> Mapping[str, Any]:
    return part if part.get("type") == "text" else {"type": "audio"}


def _refused(error: Exception) -> RowRefused:
    """A template is the model's own program and may raise anything, quoting the message: only the kind of error is told."""
    return RowRefused("invalid_messages", f"The model's processor refuses these messages ({type(error).__name__}).")
