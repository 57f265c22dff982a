"""When is a row's answer complete, and what is its text?"""

from collections.abc import Collection

import torch
from transformers import PreTrainedTokenizerBase

from ollm_service.core.leasing import RowError, RowResult
from workers.runner.prompts import EncodedRow
from workers.runner.sampling import make_generator

# A token of a stop string may be less than a character long: up to four bytes make one.
_BYTES_PER_CHARACTER = 4
NOT_A_NUMBER = "The model computed something that is not a number."


class Answer:
    """One row's answer while it grows.

    It ends at an end token or a stop string (`stop`; neither is part of the text), after `max_new_tokens` (`length`), or where
    the context leaves no more room (`context`). Every generated token counts as a completion token, the end token too.
    """

    def __init__(self, row: EncodedRow, tokenizer: PreTrainedTokenizerBase, end_tokens: Collection[int]) -> None:
        self.row = row
        self.finish_reason: str | None = None
        self.generator: torch.Generator | None = None if row.generation.is_greedy else make_generator(row.generation.seed)
        self._tokenizer = tokenizer
        self._end_tokens = end_tokens
        self._tokens: list[int] = []
        self._text: str | None = None
        self._error: RowError | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing more is generated for this row."""
        return self.finish_reason is not None or self._error is not None

    @property
    def last_token(self) -> int:
        """The newest token. Raises IndexError before the first."""
        return self._tokens[-1]

    @property
    def length(self) -> int:
        """The tokens so far, an end token too."""
        return len(self._tokens)

    def accept(self, token: int) -> None:
        """Take the next token."""
        self._tokens.append(token)
        if token in self._end_tokens:
            self.finish_reason = "stop"
            self._text = self._decode(self._tokens[:-1])
            return
        text = self._text_before_stop()
        if text is not None:
            self.finish_reason, self._text = "stop", text
        elif len(self._tokens) >= self.row.max_new_tokens:
            self.finish_reason = "context" if self.row.is_clamped else "length"

    def fail(self, message: str) -> None:
        """Give up on this row."""
        self._error = RowError(code="generation_failed", message=message)

    def result(self) -> RowResult:
        """The finished row."""
        prompt_tokens, completion_tokens = len(self.row.tokens), len(self._tokens)
        if self._error is not None:
            return RowResult(
                row=self.row.row, error=self._error, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
            )
        return RowResult(
            row=self.row.row,
            text=self._decode(self._tokens) if self._text is None else self._text,
            finish_reason=self.finish_reason,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
        )

    def _text_before_stop(self) -> str | None:
        stops = self.row.generation.stop
        if not stops:
            return None
        # Decoding everything at every step would cost the square of the length; a stop string can only end in the newest tokens.
        window = max(len(stop) for stop in stops) * _BYTES_PER_CHARACTER + _BYTES_PER_CHARACTER
        newest = self._decode(self._tokens[-window:])
        if not any(stop in newest for stop in stops):
            return None
        text = self._decode(self._tokens)
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else None

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))


def out_of_memory(row: EncodedRow) -> RowResult:
    """The result of a row that does not fit even alone."""
    message = f"Memory ran out on this row alone, with {len(row.tokens):,} prompt tokens."
    return RowResult(row=row.row, prompt_tokens=len(row.tokens), error=RowError(code="generation_failed", message=message))
