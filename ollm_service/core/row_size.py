"""How many tokens may a row have, at most? Known before anything is tokenized.

Too low only where a chat template writes much by itself, such as instructions for the model: a runner that finds a row longer
says how long it is, and the worker makes room for that.
"""

import json
from collections.abc import Mapping
from typing import Any

from ollm_service.core.content import MOST_IMAGE_TOKENS, media_parts, most_tokens_of_part

TEMPLATE_TOKENS = 64  # what a chat template may add to a row, and to each message
MESSAGE_TOKENS = 16


def prompt_bytes(request: Mapping[str, Any], image_tokens: int = MOST_IMAGE_TOKENS) -> int:
    """The bytes of a stored request's prompt, or of its messages as JSON; 0 where it has neither.

    An image or a sound counts as many as it may become tokens.
    """
    prompt = request.get("prompt")
    if isinstance(prompt, str):
        return len(prompt.encode())
    messages = request.get("messages") or ()
    texts = [{**message, "content": _without_media(message.get("content"))} for message in messages]
    written = sum(len(json.dumps(message, ensure_ascii=False).encode()) for message in texts)
    return written + sum(most_tokens_of_part(part, image_tokens) for part in media_parts(messages))


def most_tokens(request: Mapping[str, Any], max_new_tokens: int, image_tokens: int = MOST_IMAGE_TOKENS) -> int:
    """A bound on a row's tokens with its output, which is the row's own where it sets one."""
    return most_prompt_tokens(request, image_tokens) + (own_limit(request) or max_new_tokens)


def most_prompt_tokens(request: Mapping[str, Any], image_tokens: int = MOST_IMAGE_TOKENS) -> int:
    """A bound on the tokens of a row's prompt with its template. No tokenizer makes more tokens of a text than it has bytes.

    `image_tokens` are what an image becomes at the most.
    """
    messages = len(request.get("messages") or ())
    return prompt_bytes(request, image_tokens) + MESSAGE_TOKENS * messages + TEMPLATE_TOKENS


def is_sampled(request: Mapping[str, Any], temperature: float) -> bool:
    """Whether a row draws its tokens: by its own temperature, or by that of its job."""
    own: float = (request.get("generation") or {}).get("temperature", temperature)
    return own > 0


def _without_media(content: Any) -> Any:
    if not isinstance(content, list | tuple):
        return content
    return [part for part in content if not isinstance(part, Mapping) or part.get("type") == "text"]


def own_limit(request: Mapping[str, Any]) -> int | None:
    """How many tokens a row may answer at most, where it says so itself."""
    limit: int | None = (request.get("generation") or {}).get("max_new_tokens")
    return limit
