"""How do pages of keys and values lie in files, and what do they give back? Every bit of what is still wanted."""

import json
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ollm_service.core.packing import MOST_TRIED_TOKENS
from workers.runner.kv.folder import PrivateFolder, delete_orphans
from workers.runner.kv.layer import Arrival, HistoryLayer
from workers.runner.kv.paged import PagedLayer, SharedRoom
from workers.runner.kv.pages import Page, PageFile, Raw
from workers.runner.kv.resident import ResidentLayer
from workers.runner.kv.traffic import Traffic
from workers.runner.packed.pack import TokenSequence


def read_back(file: PageFile, page: Page, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A page's tokens, in tensors like these."""
    keys, values = (part.new_empty((part.shape[0], page.tokens, part.shape[-1])) for part in like)
    file.read(page, keys, values)
    return keys, values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pages_hold_the_very_bytes(tmp_path: Path, dtype: torch.dtype) -> None:
    """What is read back equals what was written, also where another page's place was taken; the manifest says where each lies."""
    traffic = Traffic()
    file = PageFile(tmp_path, 3, traffic, Raw())
    states = [(torch.randn(2, tokens, 8).to(dtype), torch.randn(2, tokens, 6).to(dtype)) for tokens in (128, 5, 128)]
    pages = [file.write(*part, most_tokens=128) for part in states[:2]]
    file.give_back(pages[0])
    pages[0] = file.write(*states[2], most_tokens=128)
    for page, part in zip(pages, (states[2], states[1]), strict=True):
        keys, values = read_back(file, page, part)
        assert torch.equal(keys, part[0])
        assert torch.equal(values, part[1])
    file.close()
    header, *entries = map(json.loads, (tmp_path / "layer-003.jsonl").read_text().splitlines())
    assert header == {"format": "ollm-kv-paged", "schema_version": 2, "layer": 3, "dtype": str(dtype).removeprefix("torch.")}
    assert [entry["tokens"] for entry in entries] == [128, 5, 128]
    assert entries[0]["offset"] == entries[2]["offset"] != entries[1]["offset"]
    data = (tmp_path / "layer-003.pages").read_bytes()
    assert traffic.bytes_written == sum(entry[part]["bytes"] for entry in entries for part in ("key", "value"))
    offset = entries[1]["offset"]
    assert data[offset : offset + entries[1]["key"]["bytes"]] == bytes(states[1][0].view(torch.uint8).flatten().tolist())


@pytest.mark.parametrize(("seed", "rows"), [*((seed, 4) for seed in range(8)), (8, 10**4), (9, 10**6)])
def test_a_paged_layer_gives_what_a_resident_one_gives(tmp_path: Path, seed: int, rows: int) -> None:
    """Whatever prompts come in however many blocks, whoever goes on, takes tokens back or leaves: the same histories.

    The more rows are expected the smaller are pages, down to one token.
    """
    chance = random.Random(seed)
    torch.manual_seed(seed)
    traffic = Traffic()
    paged = PagedLayer(PageFile(tmp_path, 0, traffic, Raw()), traffic, SharedRoom(), rows=rows, tokens=700)
    layers: tuple[HistoryLayer, HistoryLayer] = (paged, ResidentLayer())
    running: list[TokenSequence] = []
    for _ in range(60):
        if len(running) < 4 and chance.random() < 0.4:
            running.append(TokenSequence(tokens=[], capacity=chance.choice((0, 50, 900))))
            left = chance.choice((1, 5, 128, 300))
            while left:
                new = chance.choice((left, max(1, left // 2)))
                left -= new
                give(layers, running[-1], new, more=left, is_prompt=True)
        for row in list(running):
            newest = chance.choice((1, 1, 1, 2, MOST_TRIED_TOKENS + 1))
            give(layers, row, newest)
            if chance.random() < 0.3:
                row.cached -= chance.randrange(newest)
                for layer in layers:
                    layer.truncate(row, row.cached)
            if chance.random() < 0.1:
                running.remove(row)
                for layer in layers:
                    layer.forget(row)
    assert traffic.pages_written
    paged.close()


def give(
    layers: tuple[HistoryLayer, HistoryLayer], row: TokenSequence, new: int, more: int = 0, *, is_prompt: bool = False
) -> None:
    """Both layers get new tokens; they have the same history then."""
    keys, values = torch.randn(2, new, 4), torch.randn(2, new, 6)
    for layer in layers:
        layer.append(Arrival(sequence=row, start=row.cached, is_prompt=is_prompt, more=more), keys, values)
    row.cached += new
    if is_prompt and row.cached == new:
        return  # attention has a prompt's first tokens at hand
    ours, theirs = (layer.history(row) for layer in layers)
    assert ours.first == theirs.first == 0
    assert torch.equal(ours.keys_HTD, theirs.keys_HTD)
    assert torch.equal(ours.values_HTD, theirs.values_HTD)


@pytest.mark.parametrize("window", [1, 2, 7, 16, 200])
@pytest.mark.parametrize("seed", range(3))
def test_a_ring_keeps_the_newest_tokens_and_no_more(tmp_path: Path, window: int, seed: int) -> None:
    """However many tokens come at a time; the file never holds more than the window and the pages at its two ends."""
    chance = random.Random(seed)
    traffic, tokens = Traffic(), 500
    ring = PagedLayer(PageFile(tmp_path, 0, traffic, Raw()), traffic, SharedRoom(), rows=1, tokens=tokens, window=window)
    row = TokenSequence(tokens=[], capacity=tokens)
    prompt = chance.choice((1, window, 300))
    keys, values = torch.randn(2, prompt, 4), torch.randn(2, prompt, 6)
    ring.append(Arrival(sequence=row, start=0, is_prompt=True), keys, values)
    for _ in range(150):
        more = torch.randn(2, 1, 4), torch.randn(2, 1, 6)
        ring.append(Arrival(sequence=row, start=keys.shape[1], is_prompt=False), *more)
        keys, values = torch.cat([keys, more[0]], dim=1), torch.cat([values, more[1]], dim=1)
        found = ring.history(row)
        assert found.first == max(0, keys.shape[1] - window)
        assert torch.equal(found.keys_HTD, keys[:, found.first :])
        assert torch.equal(found.values_HTD, values[:, found.first :])
        assert traffic.tokens_evicted == found.first
    page = min(128, tokens)
    assert (tmp_path / "layer-000.pages").stat().st_size <= (window + 2 * page) * 2 * (4 + 6) * 4
    ring.close()


def test_layers_of_sliding_attention_keep_their_window_alone() -> None:
    """After any number of tokens at least the window is there, and at most twice as much."""
    layer, row, keys = ResidentLayer(window=10), TokenSequence(tokens=[], capacity=500), torch.empty(1, 0, 4)
    for new in (33, 1, 1, 5, 1, *[1] * 40, 12, *[3] * 20):
        more = torch.randn(1, new, 4)
        keys = torch.cat([keys, more], dim=1)
        layer.append(Arrival(sequence=row, start=keys.shape[1] - new, is_prompt=False), more, -more)
        found = layer.history(row)
        assert found.keys_HTD.shape[1] >= min(keys.shape[1], 10 - 1 + new)
        assert found.keys_HTD.shape[1] <= max(new + 9, 20)
        assert torch.equal(found.keys_HTD, keys[:, found.first :])
        assert torch.equal(found.values_HTD, -found.keys_HTD)


def test_a_truncated_page_file_is_an_error(tmp_path: Path) -> None:
    """A file that lost bytes is never read as if it were whole."""
    file = PageFile(tmp_path, 0, Traffic(), Raw())
    states = torch.zeros(1, 4, 8)
    page = file.write(states, states, most_tokens=4)
    (tmp_path / "layer-000.pages").write_bytes(b"")
    with pytest.raises(OSError, match="ends 0 bytes into a read of 128"):
        read_back(file, page, (states, states))
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
