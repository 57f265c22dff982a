"""Do copies to a CUDA device run beside what computes there, without getting into its way? And how much memory does that take?"""

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ollm_service.core.estimates import estimate_memory
from ollm_service.core.layout import Layout
from ollm_service.core.passing import DEVICE_SLOTS, HOST_SLOTS
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Finished
from ollm_service.inspection import DigestCache, inspect_models
from scripts.train_demo_model import make_tokenizer
from tests.runner.commands import make_command, only, run, work_row
from workers.runner.engine import Engine
from workers.runner.raw import pages
from workers.runner.weights.extents import ExtentFile, ExtentWriter, Origin
from workers.runner.weights.pieces import DevicePieces, HostPieces, Piece

pytestmark = pytest.mark.gpu

NAMES = ("layers.0", "layers.1", "layers.2", "layers.3", "layers.4")
ELEMENTS = 8 * 1024**2
CYCLES = 200_000_000  # of the device's clock: about a tenth of a second
CUDA: Any = torch.cuda  # of which torch annotates a part
ORIGIN = Origin(digest="d" * 64, transformers="5")


@pytest.fixture
def ahead(device: torch.device, tmp_path: Path) -> Iterator[DevicePieces]:
    """Pieces of 32 MiB, each of its own number, two of which stay in host memory."""
    writer = ExtentWriter(tmp_path, ORIGIN)
    for number, name in enumerate(NAMES):
        writer.append(name, [(f"{name}.weight", torch.full((ELEMENTS,), float(number)))], lambda: None)
    writer.finish()
    writer.close()
    source = ExtentFile(tmp_path, ORIGIN)
    found = []
    for number, name in enumerate(NAMES):
        piece = Piece(name=name, extents=source.layer(name))
        if number in {1, 2}:
            kept = pages(piece.size, device)
            source.read_all(piece.extents, kept)
            piece = replace(piece, kept=kept)
        found.append(piece)
    pieces = DevicePieces(HostPieces(source, HOST_SLOTS, device), device)
    pieces.open(found)
    yield pieces
    pieces.close()
    source.close()


def numbers_in(held: torch.Tensor) -> torch.Tensor:
    """Smallest and largest number of a piece, on the device."""
    return torch.stack(torch.aminmax(held[: ELEMENTS * 4].view(torch.float32)))


def test_host_memory_for_a_device_is_page_locked(device: torch.device) -> None:
    """Also when it lies where other locked memory was before."""
    for _ in range(5):
        held = pages(3 * 1024**2 + 5, device)
        assert held.is_pinned()
        assert held.data_ptr() % 4096 == 0
        del held


def test_the_next_piece_arrives_while_the_device_computes(device: torch.device, ahead: DevicePieces) -> None:
    """A copy waits for the computation of its own slot only: when it ends, that of the other slot is still under way."""
    first = ahead.take(NAMES[0])
    CUDA._sleep(CYCLES)
    ahead.give_back(first)  # the third piece cannot come into this slot before that is over, and then the second computes
    second = ahead.take(NAMES[1])
    CUDA._sleep(20 * CYCLES)
    is_computed = CUDA.Event()
    is_computed.record(CUDA.current_stream(device))
    with ahead._changed:
        assert ahead._changed.wait_for(lambda: ahead._ready, timeout=60)
        _, name, has_arrived = ahead._ready[0]
    has_arrived.synchronize()
    assert not is_computed.query()
    assert name == NAMES[2]
    ahead.give_back(second)


def test_a_slot_is_not_written_to_before_it_was_computed_with(device: torch.device, ahead: DevicePieces) -> None:
    """However far the host is ahead of the device, each piece is read as it was brought."""
    found, expected = [], []
    for _ in range(4):
        for number, name in enumerate(NAMES):
            brought = ahead.take(name)
            CUDA._sleep(CYCLES)
            found.append(numbers_in(brought.held))
            expected.append([float(number)] * 2)
            ahead.give_back(brought)
    assert torch.stack(found).tolist() == expected


def test_slots_are_all_that_pieces_take_of_the_device(device: torch.device, ahead: DevicePieces) -> None:
    """Two of the largest piece while they are open, and nothing afterwards."""
    before = torch.cuda.memory_allocated(device)
    for name in NAMES:
        ahead.give_back(ahead.take(name))
    assert torch.cuda.memory_allocated(device) - before <= DEVICE_SLOTS * (ELEMENTS * 4 + 2 * 1024**2)
    ahead.close()
    assert torch.cuda.memory_allocated(device) == before


@pytest.mark.parametrize(("in_host", "on_disk"), [((), ()), ((), tuple(range(8))), (tuple(range(8)), ()), ((0, 1, 2), (5, 6, 7))])
def test_the_peak_of_device_memory_is_below_the_estimate(
    device: torch.device, tmp_path: Path, in_host: tuple[int, ...], on_disk: tuple[int, ...]
) -> None:
    """A model of 250 MB in bfloat16, of which all, some or no layers stay on the device."""
    folder = tmp_path / "models" / "llama"
    save_wide_model(folder)
    (profile,) = inspect_models(tmp_path / "models", DigestCache())
    prompts = [f"row {number}: " + "a" * 200 for number in range(8)]
    given = [work_row(number, prompt, max_new_tokens=16) for number, prompt in enumerate(prompts)]
    passes = (PassId.CPU_OFFLOAD,) if in_host or on_disk else ()
    order = make_command(folder, given, passes=passes, cache_dir=tmp_path, disk_layers=on_disk)
    placement = replace(order.placement, device_id=str(device), host_layers=in_host)
    order = replace(order, profile=profile, placement=placement)
    layout = Layout(device_kind="cuda", host_layers=in_host, disk_layers=on_disk, is_sampled=False, is_packed=True)
    longest = max(map(len, prompts)) + 1
    estimate = estimate_memory(profile, layout, rows=len(prompts), tokens=longest + 16, prompt_tokens=longest)
    gc.collect()  # models of other tests count as long as they live
    measured = only(run(Engine(), order), Finished).measured
    assert 0 < measured["peak_device_bytes"] <= estimate.device_bytes


def save_wide_model(folder: Path) -> None:
    """A llama whose layers are large beside everything else."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=3584,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
