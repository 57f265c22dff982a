"""What does a model reference mean, and which are refused before anything touches a disk or the network?"""

import pytest

from ollm_service.core.errors import InvalidReference
from ollm_service.core.reference import parse_reference


@pytest.mark.parametrize(
    ("text", "scheme", "identifier", "revision", "local_path", "is_hub_id", "directory"),
    [
        ("llama3-1B-chat", None, "llama3-1B-chat", None, None, False, "llama3-1B-chat"),
        ("  llama3-1B-chat  ", None, "llama3-1B-chat", None, None, False, "llama3-1B-chat"),
        ("alias@main", None, "alias", "main", None, False, "alias--main"),
        ("org/name", None, "org/name", None, None, True, "org--name"),
        ("org/name@v1", None, "org/name", "v1", None, True, "org--name--v1"),
        ("org/name@refs/pr/1", None, "org/name", "refs/pr/1", None, True, "org--name--refs--pr--1"),
        ("org/name@a@b", None, "org/name", "a@b", None, True, "org--name--a@b"),
        ("hf:org/name", "hf", "org/name", None, None, True, "org--name"),
        ("HF:gpt2@main", "hf", "gpt2", "main", None, True, "gpt2--main"),
        ("hf://org/name", "hf", "org/name", None, None, True, "org--name"),
        ("path:my model", "path", "my model", None, "my model", False, "my model"),
        ("PATH://folder/name", "path", "folder/name", None, "folder/name", False, "folder--name"),
        ("./folder//deeper/.", None, "folder/deeper", None, "folder/deeper", False, "folder--deeper"),
        ("path:a@b", "path", "a@b", None, "a@b", False, "a@b"),
        ("s3://bucket/model", "s3", "bucket/model", None, None, False, "bucket--model"),
        ("two words/with slash", None, "two words/with slash", None, None, False, "two words--with slash"),
        ("größe", None, "größe", None, None, False, "größe"),
    ],
)
def test_references_are_parsed(
    text: str,
    scheme: str | None,
    identifier: str,
    revision: str | None,
    local_path: str | None,
    is_hub_id: bool,
    directory: str,
) -> None:
    """Each form of the grammar, with the folder that it would have under a models root."""
    reference = parse_reference(text)
    assert (reference.scheme, reference.identifier, reference.revision) == (scheme, identifier, revision)
    assert (reference.local_path, reference.is_hub_id, reference.directory_name) == (local_path, is_hub_id, directory)
    assert reference.raw == text.strip()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "x" * 513,
        "a\nb",
        "a\0b",
        "a\x7fb",
        "a\x85b",
        "a\u202eb",
        "a\ud800b",
        "://name",
        "hf:",
        "hf:@main",
        "@main",
        "name@",
        "name@sha256:",
        "name@sha256:abc",
        "name@sha256:ABCDEF",
        "name@sha256:" + "a" * 65,
        "org/name@sha256:../..",
        "org/name@",
        "hf:..",
        "hf:../..",
        "hf:../../etc",
        "hf:/etc/passwd",
        "hf:.",
        "hf:a/b/c",
        "hf:a//b",
        "hf:a b",
        "hf:a--b",
        "hf:a..b",
        "hf:-a/b",
        "org/name@../../x",
        "org/name@/x",
        "org/" + "n" * 97,
        "a/b/c",
        "org/..",
        "path:",
        "path:.",
        "path:./",
        "path:..",
        "path:../x",
        "path:a/../../x",
        "path:/etc",
        "path://",
        "path:///etc",
        "path:~/models",
        "path:C:\\models",
        "path:a\\..\\b",
        "/etc/passwd",
        "~root",
        "..",
        ".",
        "./",
        "../models",
        "C:\\models",
        "C:/models",
    ],
)
def test_hostile_references_are_refused(text: str) -> None:
    """Nothing that climbs, hides or overflows gets past the grammar; the message repeats it short and printable."""
    with pytest.raises(InvalidReference) as refusal:
        parse_reference(text)
    assert refusal.value.param == "model"
    assert (refusal.value.status, refusal.value.code) == (400, "invalid_model_reference")
    assert refusal.value.message.isprintable()
    assert len(refusal.value.message) < 300


@pytest.mark.parametrize("name", ["alias", "org/name", "hf:name", "my model"])
def test_a_digest_stands_in_place_of_a_revision(name: str) -> None:
    """It chooses among the models of a name, and is no part of the folder's."""
    reference = parse_reference(f"{name}@sha256:{'0a' * 32}")
    assert (reference.digest, reference.revision) == ("0a" * 32, None)
    assert reference.directory_name == parse_reference(name).directory_name
    assert parse_reference(f"{name}@main").digest is None


def test_a_host_path_is_told_what_to_write_instead() -> None:
    """Workers have different disks, so a path is relative to each one's models root, and the refusal says so."""
    with pytest.raises(InvalidReference, match="not a path inside the models root") as refusal:
        parse_reference("/data/models/llama")
    assert "path:folder" in (refusal.value.remedy or "")
