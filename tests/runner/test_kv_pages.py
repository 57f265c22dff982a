"""How do pages of keys and values lie in files, and what do they give back? Every bit of what is still wanted."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from workers.runner.kv.folder import PrivateFolder, delete_orphans
from workers.runner.kv.paged import PagedLayer
from workers.runner.kv.pages import PageFile, Raw
from workers.runner.kv.traffic import Traffic


def read_back(file: PageFile, like: tuple[Tensor, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """All tokens of the file, in tensors like these."""
    keys, values = (part.new_empty((rows, part.shape[1], file.tokens, part.shape[-1])) for part in like)
    file.read(keys, values)
    return keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_hold_the_very_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is read back equals what was written, of the rows that are kept; the manifest says where each page lies."""
    traffic = Traffic()
    file = PageFile(tmp_path, 3, traffic, Raw())
    pages = [(torch.randn(4, 2, tokens, 8).to(dtype), torch.randn(4, 2, tokens, 6).to(dtype)) for tokens in (128, 5)]
    for keys, values in pages:
        file.append(keys, values)
    file.select_rows(torch.tensor([3, 1, 0]))
    file.select_rows(torch.tensor([0, 2]))
    keys_read, values_read = read_back(file, pages[0], rows=2)
    file.close()
    assert torch.equal(keys_read, torch.cat([keys for keys, _ in pages], dim=-2)[[3, 0]])
    assert torch.equal(values_read, torch.cat([values for _, values in pages], dim=-2)[[3, 0]])
    header, *entries = map(json.loads, (tmp_path / "layer-003.jsonl").read_text().splitlines())
    assert header == {"format": "ollm-kv-paged", "schema_version": 1, "layer": 3, "dtype": str(dtype).removeprefix("torch.")}
    assert [entry["tokens"] for entry in entries] == [[0, 128], [128, 133]]
    data = (tmp_path / "layer-003.pages").read_bytes()
    assert len(data) == traffic.bytes_written == sum(entry[part]["bytes"] for entry in entries for part in ("key", "value"))
    offset = entries[1]["offset"]
    assert data[offset : offset + entries[1]["key"]["bytes"]] == bytes(pages[1][0].view(torch.uint8).flatten().tolist())


def test_newest_tokens_are_forgotten_across_pages(tmp_path: Path) -> None:
    """What is cropped is gone, its place is written again, and what came before it stays."""
    file = PageFile(tmp_path, 0, Traffic(), Raw())
    states = [torch.randn(2, 1, tokens, 4) for tokens in (8, 8, 3, 5)]
    for part in states[:3]:
        file.append(part, -part)
    file.crop(9)
    file.append(states[3], -states[3])
    keys, values = read_back(file, (states[0], states[0]), rows=2)
    file.close()
    assert torch.equal(keys, torch.cat([states[0], states[1][..., :2, :], states[3]], dim=-2))
    assert torch.equal(values, -keys)
    assert (tmp_path / "layer-000.pages").stat().st_size == (8 + 8 + 5) * 2 * (2 * 4) * 4, "the third page's place"


@pytest.mark.parametrize("seed", range(8))
def test_a_paged_layer_gives_what_a_resident_one_gives(tmp_path: Path, seed: int) -> None:
    """Whatever comes at a time, is forgotten again, leaves, is there several times or changes places: the same history."""
    chance = random.Random(seed)
    torch.manual_seed(seed)
    paged = PagedLayer(PageFile(tmp_path, 0, Traffic(), Raw()))
    resident: Any = DynamicLayer()  # type: ignore[no-untyped-call]  # transformers does not annotate it
    rows = 3
    for new in (chance.choice((1, 5, 300)), *(chance.choice((1, 1, 2, 60, 128, 200)) for _ in range(25))):
        states = torch.randn(rows, 2, new, 4), torch.randn(rows, 2, new, 6)
        for ours, theirs in zip(paged.update(*states), resident.update(*states), strict=True):
            assert torch.equal(ours, theirs)
        match chance.choice(("crop", "select", "repeat", "reorder", "go on", "go on")):
            case "crop":
                forgotten = chance.randrange(min(150, resident.get_seq_length()))
                for layer in (paged, resident):
                    layer.crop(-forgotten)
            case "select" if rows > 1:
                kept = torch.tensor(sorted(chance.sample(range(rows), rows - 1)))
                for layer in (paged, resident):
                    layer.batch_select_indices(kept)
                rows -= 1
            case "repeat" if rows < 4:
                for layer in (paged, resident):
                    layer.batch_repeat_interleave(2)
                rows *= 2
            case "reorder":
                places = torch.tensor(chance.choices(range(rows), k=rows))
                for layer in (paged, resident):
                    layer.reorder_cache(places)
        assert (paged.rows, paged.get_seq_length()) == (rows, resident.get_seq_length())
        assert paged.get_mask_sizes(3) == resident.get_mask_sizes(3)
    paged.close()


def test_a_truncated_page_file_is_an_error(tmp_path: Path) -> None:
    """A file that lost bytes is never read as if it were whole."""
    file = PageFile(tmp_path, 0, Traffic(), Raw())
    states = torch.zeros(1, 1, 4, 8)
    file.append(states, states)
    (tmp_path / "layer-000.pages").write_bytes(b"")
    with pytest.raises(OSError, match="ends 0 bytes into a read of 128"):
        read_back(file, (states, states), rows=1)
    file.close()


def test_orphans_are_deleted_and_owned_folders_are_not(tmp_path: Path) -> None:
    """A folder whose owner is gone is deleted; one that is in use, a foreign one and a link out of the cache folder stay."""
    owned = PrivateFolder(tmp_path)
    orphan, foreign, outside = tmp_path / "kv-orphan", tmp_path / "kv-foreign", tmp_path / "outside"
    for folder in (orphan, foreign, outside):
        folder.mkdir()
    (orphan / "owner.lock").touch()
    (outside / "owner.lock").touch()
    (tmp_path / "kv-link").symlink_to(outside)
    assert delete_orphans(tmp_path) == 1
    assert not orphan.exists()
    assert foreign.exists()
    assert (outside / "owner.lock").exists()
    owned.delete()
    assert not owned.path.exists()
