"""Whatever a manifest holds, does its check give an answer, and never lets bytes outside a file through?"""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ollm_service.core.gds_export import EXPORT_FOLDER, EXPORT_FORMAT, EXPORT_VERSION, export_problem

SIZE = 3 * 4096
SIZES = {f"{EXPORT_FOLDER}/weights.extents": SIZE}
scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8)
names = st.text(max_size=5)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(names, inner, max_size=4))
FIELDS = ["path", "dtype", "shape", "offset", "crc32", "first"]


def manifest() -> dict[str, Any]:
    """A sound manifest of three extents, two of them slices."""
    tensors = [["embed", "float16", [2, 4], 0, 16]]
    found: dict[str, Any] = {
        name: {
            "path": "weights.extents",
            "dtype": "uint8",
            "shape": [4096],
            "offset": 4096 * number,
            "crc32": 7,
            "first": None if number == 0 else 2 * (number - 1),
            "tensors": tensors,
        }
        for number, name in enumerate(("", "embed/0", "embed/1"))
    }
    origin = {"format": EXPORT_FORMAT, "schema_version": EXPORT_VERSION, "digest": "a" * 64, "transformers": "5"}
    found[""]["origin"] = origin
    return found


def test_a_sound_manifest_has_no_problem() -> None:
    """The one that the laws below change."""
    assert export_problem(manifest(), SIZES, "a" * 64) is None
    assert "other weights" in (export_problem(manifest(), SIZES, "b" * 64) or "")
    assert export_problem(manifest(), {f"{EXPORT_FOLDER}/weights.extents": SIZE - 1}) is not None


@given(st.dictionaries(st.text(max_size=6), values, max_size=4))
def test_any_object_is_answered(given_manifest: dict[str, Any]) -> None:
    """No value makes the check raise."""
    problem = export_problem(given_manifest, SIZES)
    assert problem is None or problem


@given(st.sampled_from(["", "embed/0", "embed/1"]), st.sampled_from(FIELDS), values)
def test_a_changed_entry_stays_inside_the_file(name: str, key: str, value: Any) -> None:
    """What is let through lies in the file, whole blocks, with its tensors inside."""
    changed = manifest()
    changed[name][key] = value
    if export_problem(changed, SIZES) is None:
        for entry in changed.values():
            assert 0 <= entry["offset"] <= entry["offset"] + entry["shape"][0] <= SIZE
            assert entry["offset"] % 4096 == entry["shape"][0] % 4096 == 0


@given(st.integers(0, 4), values)
def test_a_changed_tensor_stays_inside_its_extent(field: int, value: Any) -> None:
    """What is let through has a known dtype, and as many bytes as its shape says, inside the extent."""
    changed = manifest()
    tensor: list[Any] = ["embed", "float16", [2, 4], 0, 16]
    tensor[field] = value
    changed["embed/1"]["tensors"] = [tensor]
    if export_problem(changed, SIZES) is None:
        _name, _dtype, shape, offset, size = tensor
        assert size == 2 * shape[0] * shape[1] if len(shape) == 2 and tensor[1] == "float16" else size >= 0
        assert 0 <= offset <= offset + size <= 4096
