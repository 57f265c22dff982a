"""Are weights that are copied ahead to slots of the device the right ones at the right time? With the CPU as the device."""

import ctypes
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ollm_service.core.passes import Applied
from ollm_service.core.passing import DEVICE_SLOTS, HOST_SLOTS
from ollm_service.core.plan import PassId
from ollm_service.core.wire import Execute, Finished
from tests.runner.commands import first_outcomes, make_command, only, results_of, run, work_row
from tests.runner.models import plain_greedy
from workers.runner.backends import native
from workers.runner.engine import Engine
from workers.runner.interruptions import AttemptEnded
from workers.runner.model import LoadedModel
from workers.runner.passes.specialization import SpecializationPass
from workers.runner.raw import _Pages, pages
from workers.runner.weights.extents import ALIGNMENT, DATA, ExtentFile, ExtentWriter, Origin
from workers.runner.weights.pieces import DevicePieces, HostPieces, Piece
from workers.runner.weights.streaming import LayerStream

CPU = torch.device("cpu")
ORIGIN = Origin(digest="d" * 64, transformers="5")
PROMPTS = ["one two", "a somewhat longer prompt, so that rows differ", "3"]
NEW_TOKENS = 8
NAMES = ("layers.0", "layers.1", "layers.2", "layers.3")


def passes_with_copies_ahead(model: LoadedModel, command: Execute) -> Sequence[SpecializationPass]:
    """The planned passes, on a stream that copies to the device as on one that has its own memory."""
    kept = model.stream
    assert kept is not None
    model.stream = LayerStream(kept.layers, kept.source, kept.device, kept.host, brings_ahead=True)
    return native.planned_passes(model, command)


@pytest.mark.parametrize(
    ("family", "in_host", "on_disk", "is_routed"),
    [
        ("llama", (), (0, 1), False),
        ("llama", (), (1,), False),
        ("llama", (0, 1), (), False),
        ("gemma3", (1,), (0, 2, 3), False),
        ("gpt-oss", (0, 2), (1, 3), False),
        ("qwen3-moe", (2,), (0, 1, 3), True),
        ("gpt-oss", (), (0, 1, 2, 3), True),
    ],
)
def test_layers_that_were_copied_ahead_keep_the_tokens(
    families: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    in_host: tuple[int, ...],
    on_disk: tuple[int, ...],
    is_routed: bool,
) -> None:
    """From disk, from host memory or from both, whole or without experts: the tokens of plain transformers, twice in a row."""
    model, engine = families(family), Engine(passes_with_copies_ahead)
    rows = [work_row(index, prompt, max_new_tokens=NEW_TOKENS) for index, prompt in enumerate(PROMPTS)]
    passes = (PassId.MOE_ROUTING, PassId.CPU_OFFLOAD) if is_routed else (PassId.CPU_OFFLOAD,)
    order = make_command(model, rows, passes=passes, cache_dir=tmp_path, disk_layers=on_disk)
    order = replace(order, placement=replace(order.placement, host_layers=in_host))
    expected = {index: plain_greedy(model, prompt, NEW_TOKENS) for index, prompt in enumerate(PROMPTS)}
    for _ in range(2):
        messages = run(engine, order)
        assert {row: result.text for row, result in results_of(messages).items()} == expected
        assert all(isinstance(outcome, Applied) for outcome in first_outcomes(messages).values())
        measured = only(messages, Finished).measured
        assert measured["layers_brought"] == (len(in_host) + len(on_disk)) * measured["passes"]


# ---------------------------------------------------------------------------------------- the pieces themselves


@pytest.fixture
def source(tmp_path: Path) -> Iterator[ExtentFile]:
    """Extents of different sizes, each of one number."""
    writer = ExtentWriter(tmp_path, ORIGIN)
    for number, name in enumerate(NAMES):
        writer.append(name, [(f"{name}.weight", torch.full((5000 + 3000 * number,), float(number)))], lambda: None)
    writer.finish()
    writer.close()
    opened = ExtentFile(tmp_path, ORIGIN)
    yield opened
    opened.close()


def pieces_of(source: ExtentFile, kept: Sequence[str] = ()) -> list[Piece]:
    """All extents, of which some stay in host memory."""
    found = []
    for name in NAMES:
        piece = Piece(name=name, extents=source.layer(name))
        if name in kept:
            held = pages(piece.size)
            source.read_all(piece.extents, held)
            piece = replace(piece, kept=held)
        found.append(piece)
    return found


def number_in(source: ExtentFile, name: str, held: torch.Tensor) -> float:
    """The number of which the piece is."""
    weight = source.extents[name].spans[0].of(held)
    assert weight.min() == weight.max()
    return float(weight[0])


@pytest.mark.parametrize("kept", [(), ("layers.1",), NAMES])
def test_pieces_come_round_and_round_in_few_slots(source: ExtentFile, kept: Sequence[str]) -> None:
    """Each has its own bytes for as long as it is held, while the next is copied; no more than two places are ever used."""
    ahead = DevicePieces(HostPieces(source, HOST_SLOTS, CPU), CPU)
    ahead.open(pieces_of(source, kept))
    places = set()
    for turn in range(5):
        for number, name in enumerate(NAMES):
            brought = ahead.take(name)
            places.add(brought.held.data_ptr())
            assert brought.held.numel() == max(source.extents[name].size for name in NAMES)
            if turn == 2:  # the next may arrive meanwhile, and must not come here
                wait_until_no_slot_is_free(ahead)
            assert number_in(source, name, brought.held) == number
            ahead.give_back(brought)
    ahead.close()
    assert len(places) == DEVICE_SLOTS
    assert not ahead.is_broken


def wait_until_no_slot_is_free(ahead: DevicePieces) -> None:
    """Until what comes next lies in the other slot."""
    deadline = time.monotonic() + 10
    with ahead._changed:
        while not ahead._ready:
            assert ahead._changed.wait(deadline - time.monotonic()), "the next piece did not come"


def test_after_a_pass_that_broke_off_the_first_piece_comes_again(source: ExtentFile) -> None:
    """What had been brought for it is given back, wherever it was."""
    ahead = DevicePieces(HostPieces(source, HOST_SLOTS, CPU), CPU)
    ahead.open(pieces_of(source, ("layers.2",)))
    for ended_at in range(1, len(NAMES)):
        for number, name in enumerate(NAMES[:ended_at]):
            brought = ahead.take(name)
            assert number_in(source, name, brought.held) == number
            ahead.give_back(brought)
    ahead.close()


def test_closed_pieces_can_be_opened_again_with_others(source: ExtentFile) -> None:
    """Closing leaves the device's memory and waits for nobody; without being open they bring nothing."""
    ahead = DevicePieces(HostPieces(source, HOST_SLOTS, CPU), CPU)
    ahead.open(pieces_of(source))
    ahead.close()
    with pytest.raises(RuntimeError, match="not being read any more"):
        ahead.take(NAMES[0])
    for names in (NAMES[:2], NAMES, NAMES[3:]):
        ahead.open([piece for piece in pieces_of(source) if piece.name in names])
        brought = ahead.take(names[-1])
        assert number_in(source, names[-1], brought.held) == NAMES.index(names[-1])
        ahead.give_back(brought)
        ahead.close()
        assert not ahead._slots


def test_what_the_reader_met_is_raised_where_the_piece_is_asked_for(source: ExtentFile, tmp_path: Path) -> None:
    """Damaged bytes reach nobody: pieces before them come, theirs raises, and the pieces are broken until opened anew."""
    damaged = source.extents[NAMES[2]].offset
    with (tmp_path / DATA).open("r+b") as file:
        file.seek(damaged)
        file.write(b"\xff" * ALIGNMENT)
    ahead = DevicePieces(HostPieces(source, HOST_SLOTS, CPU), CPU)
    ahead.open(pieces_of(source))
    for name in NAMES[:2]:
        ahead.give_back(ahead.take(name))
    for _ in range(2):
        with pytest.raises(AttemptEnded) as raised:
            ahead.take(NAMES[2])
        assert raised.value.code == "weights_corrupt"
    ahead.close()
    assert ahead.is_broken


def test_what_is_to_be_done_before_memory_goes_is_done_while_it_is_there() -> None:
    """With the last tensor that lies in it, once."""
    memory = _Pages(-1, ALIGNMENT)
    tensor = torch.frombuffer(memory, dtype=torch.uint8)
    tensor.fill_(7)
    seen = []
    address = tensor.data_ptr()
    memory.before_end = lambda: seen.append(still_there(address))
    view = tensor[10:20]
    del memory, tensor
    assert not seen
    del view
    assert seen == [7]


def still_there(address: int) -> int:
    """The byte at this address, which ends the process where there is no memory any more."""

    return ctypes.c_uint8.from_address(address).value


def test_nothing_is_taken_before_the_first_piece_is_asked_for(source: ExtentFile) -> None:
    """What is opened again with smaller pieces before that has slots of their size only."""
    host = HostPieces(source, HOST_SLOTS, CPU)
    ahead = DevicePieces(host, CPU)
    ahead.open(pieces_of(source))
    assert not ahead._slots
    assert not host._slots
    ahead.close()
    ahead.open(pieces_of(source)[:2])
    ahead.give_back(ahead.take(NAMES[0]))
    smaller = max(source.extents[name].size for name in NAMES[:2])
    assert {slot.numel() for slot in (*host._slots, *ahead._slots)} == {smaller}
    ahead.close()
