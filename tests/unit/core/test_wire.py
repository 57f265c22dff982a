"""Does malformed JSON from the other side raise what the reader catches, and is the format what it was?"""

import json
from pathlib import PurePosixPath
from typing import Any

import pytest

from ollm_service.core.capabilities import LiveState
from ollm_service.core.errors import InvalidOption
from ollm_service.core.estimates import MemoryEstimate
from ollm_service.core.leasing import RowError, RowResult
from ollm_service.core.options import GenerationConfig, RuntimeConfig
from ollm_service.core.passes import Applied, NotNeeded
from ollm_service.core.plan import PassId
from ollm_service.core.profile import ModelProfile
from ollm_service.core.wire import (
    LENGTH_BYTES,
    BatchDone,
    BatchStarted,
    Hello,
    Loaded,
    Stop,
    decode_message,
    encode_message,
    from_json,
    to_json,
)
from tests.unit.core.samples import profile


def test_a_frame_is_a_length_and_a_tagged_object() -> None:
    """Four bytes, big-endian, then UTF-8 JSON whose `type` is the class's name."""
    frame = encode_message(BatchStarted(rows=(1, 2)))
    assert int.from_bytes(frame[:LENGTH_BYTES], "big") == len(frame) - LENGTH_BYTES
    assert json.loads(frame[LENGTH_BYTES:]) == {"type": "BatchStarted", "rows": [1, 2]}
    assert decode_message(encode_message(Stop())[LENGTH_BYTES:]) == Stop()


def test_a_union_carries_its_class_name() -> None:
    """Pass outcomes tell themselves apart by `type`; a field of one dataclass needs none."""
    done = BatchDone(
        results=(RowResult(row=1, error=RowError(code="c", message="m")),),
        outcomes={PassId.DISK_CACHE: Applied(evidence="9 bytes"), PassId.MLP_CHUNKING: NotNeeded(reason="r")},
    )
    assert to_json(done) == {
        "results": [
            {
                "row": 1,
                "text": None,
                "finish_reason": None,
                "prompt_tokens": 0,
                "completion_tokens": 0,
                "error": {"code": "c", "message": "m"},
            }
        ],
        "outcomes": {
            "disk-cache": {"type": "Applied", "evidence": "9 bytes"},
            "mlp-chunking": {"type": "NotNeeded", "reason": "r"},
        },
        "measured": {},
    }
    assert from_json(BatchDone, to_json(done)) == done


def test_enums_paths_and_sets_become_plain_values() -> None:
    """What JSON lacks is written as text and lists, in a stable order."""
    assert to_json(profile())["path"] == "tiny-llama"
    assert to_json(profile())["modalities"] == ["text"]
    assert to_json(frozenset({3, 1, 2})) == [1, 2, 3]
    assert from_json(frozenset[int], [3, 1]) == frozenset({1, 3})


def test_an_older_reader_understands_a_newer_writer() -> None:
    """Unknown keys are passed over, missing ones take their default."""
    assert from_json(Loaded, {"seconds": 1, "was_warm": False, "invented_later": {}}) == Loaded(seconds=1.0, was_warm=False)
    assert from_json(ModelProfile, {"name": "n", "path": "p", "digest": "d"}) == ModelProfile(
        name="n", path=PurePosixPath("p"), digest="d"
    )
    told = {"device_free_bytes": {"cpu": 1}, "host_free_bytes": 1}
    assert from_json(LiveState, told) == LiveState(device_free_bytes={"cpu": 1}, host_free_bytes=1)
    without = {"weights": 1, "kv": 2, "activations": 3, "logits": 4, "workspace": 5, "disk": 6}
    assert from_json(MemoryEstimate, without).disk_bytes == 6


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"null",
        b"7",
        b'"Stop"',
        b"[]",
        b"{}",
        b'{"type": 7}',
        b'{"type": ["Stop"]}',
        b'{"type": "RuntimePlan"}',
        b'{"type": "Hello"}',
        b'{"type": "Hello", "pid": "x", "versions": {}}',
        b'{"type": "Hello", "pid": true, "versions": {}}',
        b'{"type": "Hello", "pid": 1, "versions": []}',
        b'{"type": "Hello", "pid": 1, "versions": null}',
        b'{"type": "Hello", "pid": 1, "versions": {"torch": 2}}',
        b'{"type": "Loaded", "seconds": "1", "was_warm": false}',
        b'{"type": "Loaded", "seconds": true, "was_warm": false}',
        b'{"type": "Loaded", "seconds": 1, "was_warm": 0}',
        b'{"type": "BatchStarted", "rows": "12"}',
        b'{"type": "BatchStarted", "rows": {"1": 2}}',
        b'{"type": "BatchStarted", "rows": 1}',
        b'{"type": "BatchDone", "results": [7]}',
        b'{"type": "BatchDone", "results": [{"row": 1}]}',
        b'{"type": "BatchDone", "results": [], "outcomes": {"turbo": {"type": "Applied", "evidence": "x"}}}',
        b'{"type": "BatchDone", "results": [], "outcomes": {"disk-cache": {"type": "Maybe"}}}',
        b'{"type": "BatchDone", "results": [], "outcomes": {"disk-cache": "Applied"}}',
        b"[" * 100_000,
    ],
)
def test_a_malformed_message_is_a_value_error(body: bytes) -> None:
    """Whatever the bytes are, the reader has one thing to catch."""
    with pytest.raises(ValueError):  # noqa: PT011 - from JSON, from a key, a type or an invariant
        decode_message(body)


@pytest.mark.parametrize(
    ("kind", "data", "error"),
    [
        (Hello, {"pid": 1}, TypeError),
        (ModelProfile, {"name": "n", "path": 7, "digest": "d"}, TypeError),
        (ModelProfile, {"name": "n", "path": "/abs", "digest": "d"}, ValueError),
        (ModelProfile, {"name": "n", "path": "p", "digest": "d", "family": "gpt"}, ValueError),
        (ModelProfile, {"name": "n", "path": "p", "digest": "d", "family": 1}, TypeError),
        (RuntimeConfig, {"offload_cpu_layers": "1"}, TypeError),
        (GenerationConfig, {"stop": "ab"}, TypeError),
        (GenerationConfig, {"temperature": -1}, InvalidOption),
    ],
)
def test_stored_json_is_read_strictly(kind: type[Any], data: Any, error: type[Exception]) -> None:
    """A value of another JSON type is a TypeError, one that is not allowed a ValueError; options keep their own error."""
    with pytest.raises(error):
        from_json(kind, data)


def test_a_frame_has_a_limit() -> None:
    """A message that no reader would accept is not sent."""
    with pytest.raises(ValueError, match="too long for one frame"):
        encode_message(Hello(pid=1, versions={"x": "y" * 100}), longest=99)


def test_a_result_is_a_text_or_an_error() -> None:
    """Never both, never neither."""
    for wrong in ({}, {"text": "a", "error": RowError(code="c", message="m")}):
        with pytest.raises(ValueError, match="not both"):
            RowResult(row=1, **wrong)  # type: ignore[arg-type]  # each value fits one of the two
