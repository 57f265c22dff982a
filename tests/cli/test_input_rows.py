"""Which rows come out of a file? Of ours, of OpenAI's batches, of CSV, and of files that are broken."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ollm_service.cli.input_rows import is_batch_line, read_csv, read_json_lines, read_rows
from ollm_service.coordinator.rows import check_rows
from ollm_service.core.errors import InvalidJob, InvalidOption
from ollm_service.core.options import GenerationConfig

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
BODY_FIELDS = st.sampled_from(
    ["model", "messages", "prompt", "max_tokens", "max_completion_tokens", "stop", "n", "tools", "seed"]
)


def lines(*rows: Any) -> bytes:
    """JSONL."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def batch_line(url: str = "/v1/chat/completions", **body: Any) -> dict[str, Any]:
    """A line of OpenAI's batch format."""
    return {"custom_id": "x", "method": "POST", "url": url, "body": {"model": "m", **body}}


def only(content: bytes, *, model: str | None = None) -> dict[str, Any]:
    """The one row of a file."""
    (row,) = read_json_lines(content, model=model).rows
    return dict(row)


def test_our_own_rows_are_sent_as_they_are() -> None:
    """Nothing is added to a row of ours, and nothing taken away."""
    rows = [{"prompt": "a"}, {"custom_id": "b", "messages": [{"role": "user", "content": "c"}], "generation": {"seed": 1}}]
    read = read_json_lines(lines(*rows), model="m")
    assert (list(read.rows), read.model) == (rows, "m")


def test_a_chat_line_becomes_a_row() -> None:
    """Messages stay messages, and OpenAI's names of settings become ours."""
    messages = [{"role": "user", "content": "Hello"}]
    settings: dict[str, Any] = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a"], "user": None}
    row = only(lines(batch_line(messages=messages, **settings)))
    generation = {"max_new_tokens": 5, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": ["a"]}
    assert row == {"custom_id": "x", "messages": messages, "generation": generation}


def test_the_newer_name_of_a_setting_wins() -> None:
    """max_completion_tokens is what counts where a line has both, in whichever order they stand."""
    for names in (("max_tokens", "max_completion_tokens"), ("max_completion_tokens", "max_tokens")):
        values: dict[str, Any] = {"max_tokens": 1, "max_completion_tokens": 2}
        row = only(lines(batch_line(messages=[], **{name: values[name] for name in names})))
        assert row["generation"] == {"max_new_tokens": 2}


def test_the_first_batch_line_names_the_model() -> None:
    """The job is for the model of the first line unless one is given; a line for another model fails by its number."""
    content = lines(batch_line(prompt="a"), {**batch_line(prompt="b"), "custom_id": "y"} | {"body": {"model": "other"}})
    read = read_json_lines(content, model=None)
    assert read.model == "m"
    assert "unreadable" not in read.rows[0]
    assert read.rows[1]["unreadable"] == "line 2 asks for the model 'other', but the job is for 'm'"
    assert read_json_lines(content, model="other").model == "other"


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (batch_line(messages=[{"role": "user", "content": "a"}], n=2), "unsupported_option"),
        (batch_line(messages=[{"role": "user", "content": "a"}], logprobs=True), "unsupported_option"),
        (batch_line(messages=[{"role": "user", "content": "a"}], reasoning="much"), "unknown_field"),
        (batch_line("/v1/embeddings", prompt="a"), "unknown_field"),
        ({**batch_line(prompt="a"), "method": "GET"}, "unknown_field"),
        (batch_line(prompt=["a", "b"]), "invalid_prompt"),
        (batch_line(prompt="a", max_tokens="many"), "invalid_option"),
    ],
)
def test_what_a_line_asks_for_is_never_silently_ignored(line: dict[str, Any], code: str) -> None:
    """A setting that we do not have reaches the service, which refuses that row by name."""
    (row,) = check_rows([only(lines(line))], GenerationConfig())
    assert row.error is not None
    assert row.error.code == code


@pytest.mark.parametrize("settings", [{"n": 1}, {"stream": False}, {"logprobs": None}, {"presence_penalty": 0}])
def test_settings_that_ask_for_nothing_are_no_obstacle(settings: dict[str, Any]) -> None:
    """What many clients always send, and what means nothing, does not fail a row."""
    (row,) = check_rows([only(lines(batch_line("/v1/completions", prompt="a", **settings)))], GenerationConfig())
    assert row.error is None


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'"prompt"', "not a JSON object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": 1e999}', "too large"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "digits"),
    ],
)
def test_a_malformed_line_fails_alone_and_by_its_number(line: bytes, why: str) -> None:
    """The other rows are kept, and the service is told which line it was and what is wrong with it."""
    content = lines({"prompt": "a"}) + b"\n" + line + b"\n" + lines({"prompt": "b"})
    rows = read_json_lines(content, model="m").rows
    assert [row.get("prompt") for row in rows] == ["a", None, "b"]
    assert rows[1]["custom_id"] == "line-3"
    checked = check_rows(list(rows), GenerationConfig())
    assert [row.error is None for row in checked] == [True, False, True]
    assert checked[1].error is not None
    assert checked[1].error.code == "unreadable_row"
    assert checked[1].error.message.startswith("line 3 is ")
    assert why in checked[1].error.message


def test_a_malformed_line_never_takes_the_name_of_a_good_row() -> None:
    """A user's own `line-2` stays unique, so that the job is not refused."""
    rows = read_json_lines(lines({"custom_id": "line-2", "prompt": "a"}) + b"oops\n", model="m").rows
    assert "custom_id" not in rows[1]
    assert len({row.custom_id for row in check_rows(list(rows), GenerationConfig())}) == 2


def test_marks_blank_lines_and_separators_of_unicode_do_no_harm() -> None:
    """A byte order mark, empty lines, Windows line ends and a raw U+2028 inside a text."""
    content = b"\xef\xbb\xbf" + '{"prompt": "a\u2028b"}\r\n\r\n{"prompt": "c"}'.encode()
    assert [row["prompt"] for row in read_json_lines(content, model="m").rows] == ["a\u2028b", "c"]


@given(st.lists(JSON, max_size=5))
def test_every_line_gives_exactly_one_row(values: list[Any]) -> None:
    """No JSON value breaks the reader, and none is lost."""
    rows = read_json_lines(lines(*values), model="m").rows
    assert len(rows) == len(values)
    for row, value in zip(rows, values, strict=True):
        if isinstance(value, dict) and not is_batch_line(value):
            assert row == value


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(content: bytes) -> None:
    """Whatever a file holds, each line that is not blank becomes one row."""
    stripped = content.removeprefix(b"\xef\xbb\xbf")
    expected = sum(bool(line.strip()) for line in stripped.split(b"\n"))
    assert len(read_json_lines(content, model="m").rows) == expected


@given(st.dictionaries(BODY_FIELDS, JSON), st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/other", None, 7]))
def test_no_field_of_a_batch_line_disappears(body: dict[str, Any], url: Any) -> None:
    """Every field of a body that is not null is in the row, under our name or its own, or is the reason for its failure."""
    row = only(lines({"custom_id": "x", "method": "POST", "url": url, "body": body}), model="m")
    ours = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens", "stop": "stop", "seed": "seed"}
    for name, value in body.items():
        if value is None or (name == "model" and value == "m"):
            continue
        if name == "model":
            assert "unreadable" in row
        elif name in ours:
            assert ours[name] in row["generation"]
        else:
            assert row[name] == value
    assert ("url" in row) == (url not in ("/v1/chat/completions", "/v1/completions"))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1), min_size=1, max_size=4))
def test_csv_gives_back_what_was_written(prompts: list[str]) -> None:
    """Quotes, commas and line breaks inside a field survive."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, quoting=csv.QUOTE_ALL)
    writer.writerows([["id", "text"], *(["1", prompt] for prompt in prompts)])
    assert [row["prompt"] for row in read_csv(stream.getvalue().encode(), "text")] == prompts


def test_csv_takes_its_ids_from_their_column(tmp_path: Path) -> None:
    """A column custom_id names the rows; without --prompt-column the column `prompt` is taken."""
    path = tmp_path / "rows.CSV"
    path.write_text("\ufeffcustom_id,prompt\nb,Hello\n,again\n", encoding="utf-8")
    assert read_rows(str(path), model="m").rows == ({"prompt": "Hello", "custom_id": "b"}, {"prompt": "again"})


@pytest.mark.parametrize("column", [None, "prompt"])
def test_a_missing_column_is_told_with_those_that_are_there(tmp_path: Path, column: str | None) -> None:
    """The error lists the columns of the file."""
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\na,b\n", encoding="utf-8")
    with pytest.raises(InvalidOption, match="question, answer"):
        read_rows(str(path), model="m", prompt_column=column)


def test_a_comma_too_many_fails_that_row_alone(tmp_path: Path) -> None:
    """A record that is longer than the header would lose the end of its prompt: it fails by its line number."""
    path = tmp_path / "rows.csv"
    path.write_text("prompt\nfine\nHello, world\n", encoding="utf-8")
    fine, broken = read_rows(str(path), model="m").rows
    assert fine == {"prompt": "fine"}
    assert broken["unreadable"].startswith("line 3 is longer than the header")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", b""), ("a.csv", b"prompt\n"), ("a.csv", b'prompt\n"x'), ("a.csv", b"\xff"), ("a.jsonl", b"\n \n")],
)
def test_a_file_without_rows_is_refused_before_anything_is_sent(tmp_path: Path, name: str, content: bytes) -> None:
    """An empty or unreadable file is an InvalidJob that names it."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InvalidJob):
        read_rows(str(path), model="m")


def test_no_file_fills_the_memory() -> None:
    """Reading ends where no service would take it any more, also where the file has no end."""
    with pytest.raises(InvalidJob, match=r"/dev/zero is over 1,000 bytes"):
        read_rows("/dev/zero", model="m", longest=1000)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    """The error names the file and what the system says about it."""
    with pytest.raises(InvalidJob, match=r"none\.jsonl cannot be read: No such file"):
        read_rows(str(tmp_path / "none.jsonl"), model="m")
