"""Which rows of a submission can run, and what is said of the others?"""

import json
from pathlib import Path
from typing import Any

import pytest

from ollm_service.cli.input_rows import read_rows
from ollm_service.coordinator.rows import LONGEST_CUSTOM_ID, check_rows, refuse_media
from ollm_service.core.content import MOST_IMAGE_TOKENS
from ollm_service.core.errors import InvalidJob
from ollm_service.core.options import GenerationConfig
from ollm_service.core.plan import ModelModality
from ollm_service.core.row_size import most_prompt_tokens

DEMO = Path(__file__).parents[2] / "demo"
JOB = GenerationConfig(max_new_tokens=9, temperature=0.5)
HELLO = [{"role": "user", "content": "Hello"}]
PNG_URL = "data:image/png;base64,"
IMAGE = {"type": "image_url", "image_url": {"url": f"{PNG_URL}AAAA"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}


def with_part(*parts: Any) -> dict[str, Any]:
    """A row with one message of these parts."""
    return {"messages": [{"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("row", "request_"),
    [
        ({"prompt": "a"}, {"prompt": "a"}),
        ({"prompt": " "}, {"prompt": " "}),
        ({"prompt": "nul \0 and \U0001f600"}, {"prompt": "nul \0 and \U0001f600"}),
        ({"prompt": "a", "messages": None, "generation": None}, {"prompt": "a"}),
        ({"prompt": "a", "n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}}, {"prompt": "a"}),
        ({"prompt": "a", "generation": {"seed": 3, "top_k": None, "n": 1}}, {"prompt": "a", "generation": {"seed": 3}}),
        ({"prompt": "a", "generation": {"temperature": 0}}, {"prompt": "a", "generation": {"temperature": 0}}),
        ({"messages": HELLO}, {"messages": HELLO}),
        ({"messages": [{**HELLO[0], "name": None, "tool_calls": []}]}, {"messages": HELLO}),
        (
            with_part({"type": "image_url", "image_url": {"url": f"{PNG_URL}AAAA", "detail": "high"}}, SOUND),
            {"messages": [{"role": "user", "content": [IMAGE, SOUND]}]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]}]},
            {"messages": HELLO},
        ),
    ],
)
def test_a_good_row_keeps_what_it_asks(row: dict[str, Any], request_: dict[str, Any]) -> None:
    """A good row is stored as its prompt or messages with its own generation settings, nulls and no-op settings left out."""
    (checked,) = check_rows([row], JOB)
    assert (checked.error, checked.request) == (None, request_)


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (7, "invalid_row"),
        (None, "invalid_row"),
        (["a"], "invalid_row"),
        ("a", "invalid_row"),
        ({}, "prompt_missing"),
        ({"prompt": ""}, "prompt_missing"),
        ({"prompt": None, "custom_id": "x"}, "prompt_missing"),
        ({"prompt": "a", "messages": HELLO}, "invalid_row"),
        ({"prompt": ["a"]}, "invalid_prompt"),
        ({"prompt": "half \ud83d"}, "invalid_prompt"),
        ({"prompt": "a", "custom_id": 5}, "invalid_custom_id"),
        ({"prompt": "a", "custom_id": ""}, "invalid_custom_id"),
        ({"prompt": "a", "custom_id": "x" * (LONGEST_CUSTOM_ID + 1)}, "invalid_custom_id"),
        ({"prompt": "a", "custom_id": "\udc00"}, "invalid_custom_id"),
        ({"prompt": "a", "colour": "red"}, "unknown_field"),
        ({"prompt": "a", "n": 2}, "unsupported_option"),
        ({"prompt": "a", "n": True}, "unsupported_option"),
        ({"prompt": "a", "logprobs": True}, "unsupported_option"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "unsupported_option"),
        ({"messages": HELLO, "response_format": {"type": "json_object"}}, "unsupported_option"),
        ({"prompt": "a", "generation": {"n": 3}}, "unsupported_option"),
        ({"prompt": "a", "generation": 5}, "invalid_option"),
        ({"prompt": "a", "generation": {"temperature": -1}}, "invalid_option"),
        ({"prompt": "a", "generation": {"colour": 1}}, "invalid_option"),
        ({"prompt": "a", "generation": {"stop": ["a", "b", "c", "d", "e"]}}, "invalid_option"),
        ({"messages": []}, "invalid_messages"),
        ({"messages": "Hello"}, "invalid_messages"),
        ({"messages": ["Hello"]}, "invalid_messages"),
        ({"messages": [{"role": "user"}]}, "invalid_messages"),
        ({"messages": [{"content": "a"}]}, "invalid_messages"),
        ({"messages": [{"role": "", "content": "a"}]}, "invalid_messages"),
        ({"messages": [{"role": "user", "content": None}]}, "invalid_messages"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, "invalid_messages"),
        (with_part({"type": "image_url"}), "invalid_content"),
        (with_part({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}), "unsupported_content"),
        (with_part({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}), "unsupported_content"),
        (with_part({"type": "image_url", "image_url": {"url": "data:image/svg+xml;base64,AAAA"}}), "unsupported_content"),
        (with_part({"type": "image_url", "image_url": {"url": "data:image/png;base64,%%%"}}), "invalid_content"),
        (with_part({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}), "invalid_content"),
        (with_part({"type": "image_url", "image_url": {"url": PNG_URL + "A" * 4 * 7 * 1024**2}}), "content_too_large"),
        (with_part({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}}), "unsupported_content"),
        (with_part({"type": "input_audio", "input_audio": {"data": 7, "format": "wav"}}), "invalid_content"),
        (with_part({"type": "input_audio"}), "unsupported_content"),
        (with_part({"type": "video_url", "video_url": {"url": "data:"}}), "unsupported_content"),
        (with_part({"type": "text", "text": 5}), "invalid_messages"),
        (with_part("an image"), "invalid_messages"),
        ({"messages": [{"role": "user", "content": [IMAGE] * 65}]}, "content_too_large"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "unsupported_option"),
    ],
)
def test_a_wrong_row_fails_alone_and_says_why(row: Any, code: str) -> None:
    """A row that is wrong by itself carries its error and keeps nothing; its neighbours are as they were."""
    before, checked, after = check_rows([{"prompt": "b"}, row, {"prompt": "c"}], JOB)
    assert checked.error is not None
    assert (checked.error.code, checked.request, checked.row) == (code, {}, 1)
    assert checked.error.message.endswith(".")
    assert (before.error, after.error) == (None, None)


def test_a_row_error_never_quotes_the_prompt() -> None:
    """What a user wrote does not travel into error messages."""
    (checked,) = check_rows([{"prompt": "my secret", "messages": HELLO}], JOB)
    assert checked.error is not None
    assert "secret" not in checked.error.message


def test_every_row_gets_a_custom_id_of_its_own() -> None:
    """Rows without a usable custom_id are named after their number, but never as another row is named already."""
    rows = [{"prompt": "a"}, {"prompt": "b", "custom_id": "row-0"}, 7, {"prompt": "c", "custom_id": "mine"}]
    assert [row.custom_id for row in check_rows(rows, JOB)] == ["row-0-", "row-0", "row-2", "mine"]


def test_a_duplicate_custom_id_refuses_the_whole_job() -> None:
    """The error names the custom_id and both of its rows."""
    rows = [{"prompt": "a", "custom_id": "x"}, {"prompt": "b"}, {"prompt": "c", "custom_id": "x"}]
    with pytest.raises(InvalidJob, match="`x` is used by row 0 and by row 2") as caught:
        check_rows(rows, JOB)
    assert caught.value.param == "rows[2].custom_id"


def test_a_job_without_rows_is_refused() -> None:
    """An empty job is an error, not a job that is done."""
    with pytest.raises(InvalidJob, match="no rows"):
        check_rows([], JOB)


def test_the_demos_questions_are_a_plain_input() -> None:
    """`ollm-service submit demo/heldout.jsonl` has nothing to complain of, and each question has its answer beside it."""
    rows = check_rows(read_rows(str(DEMO / "heldout.jsonl"), model=None, prompt_column=None).rows, JOB)
    assert [row.error for row in rows] == [None] * 200
    assert {row.custom_id for row in rows} == json.loads((DEMO / "heldout_answers.json").read_text(encoding="utf-8")).keys()


def test_what_a_model_does_not_take_is_refused_row_by_row() -> None:
    """An image to a model of text is that row's error, which names what the model takes; the others are as they were."""
    rows = check_rows([with_part(IMAGE), {"prompt": "a"}, with_part(SOUND), with_part(IMAGE, SOUND)], JOB)
    text, image = (
        refuse_media(rows, {ModelModality.TEXT}, "m"),
        refuse_media(rows, {ModelModality.TEXT, ModelModality.IMAGE}, "m"),
    )
    assert [row.error is None for row in text] == [False, True, False, False]
    assert [row.error is None for row in image] == [True, True, False, False]
    assert text[0].error is not None
    assert (text[0].error.code, text[0].request) == ("unsupported_content", {})
    assert text[0].error.message == "m takes text, no image; name a model that does, or send text."


def test_a_bound_of_tokens_does_not_count_the_bytes_of_media() -> None:
    """A row with a large image counts as many tokens as an image may become, and a sound by how long it can be."""
    small, large = (with_part({"type": "image_url", "image_url": {"url": PNG_URL + "A" * size}}) for size in (4, 4_000_000))
    assert most_prompt_tokens(small) == most_prompt_tokens(large)
    assert most_prompt_tokens(small) - most_prompt_tokens(small, 264) == MOST_IMAGE_TOKENS - 264
    minute = with_part({"type": "input_audio", "input_audio": {"data": "A" * (60 * 32_000 * 4 // 3), "format": "wav"}})
    assert 750 < most_prompt_tokens(minute) < 3_000
