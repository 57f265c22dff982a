"""Which tokens does a row feed to the model, and may it run at all?

Rules: a prompt is raw text with the tokenizer's own special tokens; messages go through the chat template, which brings its own,
so none are added a second time. A row that cannot run becomes a result with an error and never stops the others.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ollm_service.core.content import media_parts
from ollm_service.core.leasing import RowError, RowResult, WorkRow
from ollm_service.core.options import GenerationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Media:
    """What a prompt's forward pass takes besides the tokens: images or sounds, and what says where they stand.

    Tensors are larger than the files that they come from, and a plan has many rows: none is kept, `read` makes them anew, by
    argument name. `shapes` are theirs. `spans` are where tokens stand that see each other, from and to: those of an image,
    where the model has it so.
    """

    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    spans: tuple[tuple[int, int], ...]
    read: Callable[[], Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """A row that is ready to run. `is_clamped`: the context leaves less room than the tokens that were asked for.

    Outside packs rows with media run with rows of equal `media_shapes` alone.
    """

    row: int
    tokens: tuple[int, ...]
    generation: GenerationConfig
    max_new_tokens: int
    is_clamped: bool
    media: Media | None = field(default=None, compare=False)

    @property
    def media_shapes(self) -> tuple[Any, ...]:
        """Equal for rows that can be fed together without padding; empty where there is only text."""
        return () if self.media is None else (len(self.tokens), *self.media.shapes)


class ReadsMedia(Protocol):
    """Reads messages with images or sounds; see `workers.runner.media.readers`."""

    def read(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[int], dict[str, Tensor]]:
        """The row's tokens and its media. Raises RowRefused."""


class RowRefused(Exception):
    """This row cannot run."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.error = RowError(code=code, message=message)


def encode_row(
    row: WorkRow,
    tokenizer: PreTrainedTokenizerBase,
    context_limit: int | None,
    *,
    is_source: bool = False,
    reader: ReadsMedia | None = None,
) -> EncodedRow | RowResult:
    """The row's tokens, or its error result. Without a `reader` the model is given text only.

    `context_limit` is in tokens, prompt and answer together; a prompt that is a source has as much for itself as its answer has.
    """
    try:
        tokens, media = _tokens_and_media(row, tokenizer, reader)
        if is_source and context_limit is not None and len(tokens) > context_limit:
            raise RowRefused(
                "context_length_exceeded", f"The prompt has {len(tokens):,} tokens; the model reads {context_limit:,} at most."
            )
        room = None if context_limit is None else context_limit - (0 if is_source else len(tokens))
        if room is not None and room < 1:
            raise RowRefused(
                "context_length_exceeded",
                f"The prompt has {len(tokens):,} tokens; the context holds {context_limit:,}, one of them for the answer.",
            )
    except RowRefused as refusal:
        return RowResult(row=row.row, error=refusal.error)
    wanted = row.generation.max_new_tokens
    return EncodedRow(
        row=row.row,
        tokens=tuple(tokens),
        generation=row.generation,
        max_new_tokens=wanted if room is None else min(wanted, room),
        is_clamped=room is not None and room < wanted,
        media=media,
    )


def _tokens_and_media(
    row: WorkRow, tokenizer: PreTrainedTokenizerBase, reader: ReadsMedia | None
) -> tuple[list[int], Media | None]:
    has_media = any(True for _ in media_parts(row.messages))
    # Some models keep their chat template with the processor alone.
    is_for_reader = row.messages is not None and reader is not None and tokenizer.chat_template is None
    if row.messages is None or not (has_media or is_for_reader):
        return _tokens(row, tokenizer), None
    if reader is None:
        raise RowRefused("unsupported_content", "A message has a part that is not text; this model is given text only.")
    messages = row.messages
    tokens, tensors = reader.read(messages)
    return tokens, media_of(tensors, lambda: reader.read(messages)[1])


def media_of(tensors: Mapping[str, Tensor], read: Callable[[], Mapping[str, Tensor]]) -> Media | None:
    """What is to be known of these tensors, which `read` makes again; None where there are none."""
    if not tensors:
        return None
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(tensors.items()))
    marks = tensors.get("token_type_ids")
    return Media(shapes=shapes, spans=() if marks is None else _spans(marks[0].tolist()), read=read)


def _spans(marks: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """From and to of each run of ones."""
    places = {place: None for place, mark in enumerate(marks) if mark == 1}
    starts = [place for place in places if place - 1 not in places]
    ends = [place + 1 for place in places if place + 1 not in places]
    return tuple(zip(starts, ends, strict=True))


def _tokens(row: WorkRow, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if row.messages is not None:
        text, adds_special_tokens = _chat_text(row.messages, tokenizer), False
    elif isinstance(row.prompt, str):
        text, adds_special_tokens = row.prompt, True
    else:
        raise RowRefused("prompt_missing", "The row has neither a prompt nor messages.")
    # A long prompt would make the tokenizer warn about the model's maximum; we check that ourselves.
    tokens: list[int] = tokenizer(text, add_special_tokens=adds_special_tokens, verbose=False)["input_ids"]
    if not tokens:
        raise RowRefused("prompt_missing", "The prompt is empty.")
    return tokens


def _chat_text(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.chat_template is None:
        raise RowRefused("chat_template_missing", "The model has no chat template; send a prompt instead of messages.")
    if not messages:
        raise RowRefused("invalid_messages", "The list of messages is empty.")
    plain = [_plain(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        # A template is the model's own program and may raise anything, quoting the message: only the kind of error is told.
        raise RowRefused(
            "invalid_messages", f"The model's chat template refuses these messages ({type(error).__name__})."
        ) from error
    return str(text)


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with a list of text parts joined to one text."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise RowRefused("invalid_messages", "A message has no role.")
    if isinstance(content, list | tuple):
        parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
        if not all(isinstance(part, str) for part in parts):
            raise RowRefused("invalid_messages", "A message has a part that is not text; this model is given text only.")
        content = "".join(str(part) for part in parts)
    if not isinstance(content, str):
        raise RowRefused("invalid_messages", "A message has no text content.")
    return {**message, "role": role, "content": content}
