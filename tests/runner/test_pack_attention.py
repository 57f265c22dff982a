"""Does each sequence of a pack see exactly what it would see alone? Compared with all scores at once, in float64."""

import random

import pytest
import torch
from torch import Tensor, nn

from workers.runner.kv.cache import PackCache
from workers.runner.kv.layer import Arrival
from workers.runner.kv.resident import ResidentLayer
from workers.runner.kv.slots import Slots, Step
from workers.runner.packed import attention
from workers.runner.packed.attention import Rule, attend_in_pack
from workers.runner.packed.pack import Pack, TokenSequence

HEADS, KEY_HEADS, WIDTH = 4, 2, 8


class Attention(nn.Module):
    """What is known of a model's attention module: the number of its layer."""

    layer_idx = 0


class Text:
    """A sequence with all of its queries, keys and values [heads, tokens, width], its parent's included."""

    def __init__(self, tokens: int, parent: "Text | None" = None) -> None:
        self.parent = parent
        before: list[list[Tensor]] = [] if parent is None else [parent.states]
        own = [torch.randn(heads, tokens, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
        self.states: list[Tensor] = [torch.cat([*(one[part] for one in before), own[part]], dim=1) for part in range(3)]
        self.sequence: TokenSequence = TokenSequence(
            tokens=[0] * tokens, capacity=tokens, parent=None if parent is None else parent.sequence
        )

    def expected(self, window: int | None, cap: float | None, sinks: Tensor | None) -> Tensor:
        """[own tokens, heads, width]: softmax of all scores, masked."""
        query, key, value = (part.double() for part in self.states)
        key, value = (part.repeat_interleave(HEADS // KEY_HEADS, dim=0) for part in (key, value))
        scores = query @ key.transpose(1, 2) * 0.3
        if cap is not None:
            scores = (scores / cap).tanh() * cap
        places = torch.arange(query.shape[1])
        back = places.unsqueeze(-1) - places
        seen = (back >= 0) & (back < (window or 10**9))
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, len(places), 1)], dim=-1)
        weights = scores.softmax(dim=-1)[..., : len(places)]
        return (weights @ value).transpose(0, 1)[self.sequence.first_position :].float()


def through_packs(texts: list[Text], chance: random.Random, block: int, rule: Rule, rows: int, slots: Slots) -> dict[int, Tensor]:
    """Everything that the texts get while they go through packs, some tokens at a time, in blocks of so many."""
    cache = PackCache([ResidentLayer(rule.window, slots)], most_cells=chance.choice((16, 500, 10**6)))
    cache.expect(rows, chance.choice((20, 60)))
    found: dict[int, list[Tensor]] = {number: [] for number in range(len(texts))}
    left = {number: len(text.sequence.tokens) for number, text in enumerate(texts)}
    for text in texts:
        text.sequence.tokens.clear()
    while any(left.values()):
        pack, who = Pack(), []
        for number, text in enumerate(texts):
            is_first = not text.sequence.cached
            if text.parent is not None and left[texts.index(text.parent)]:
                continue
            if left[number] and (is_first or chance.random() < 0.7):
                new = min(left[number], chance.choice((1, 1, 2, 3)) if not is_first else chance.choice((1, 7, 40, 99)))
                text.sequence.tokens += [0] * new
                pack.add(text.sequence, wanted=0, is_prompt=is_first)
                left[number] -= new
                who.append(number)
        if not who:
            continue
        states = [_cut(texts, who, part) for part in range(3)]
        for one in pack.blocks(block):
            cache.block = one
            query, key, value = (part[None, :, one.begin : one.end] for part in states)
            cache.update(key, value, 0)
            output, _ = attend_in_pack(
                Attention(), query, key, value, None, 0.3, rule.window, rule.cap, s_aux=rule.sinks_A, pack_cache=cache
            )
            for segment in one.segments:
                number = next(number for number, text in enumerate(texts) if text.sequence is segment.sequence)
                found[number].append(output[0, segment.begin : segment.end])
        for number in who:
            texts[number].sequence.cached = len(texts[number].sequence.tokens)
            is_shared = any(text.parent is texts[number] for text in texts)
            if not left[number] and not is_shared:
                for kept in cache.history_layer(0).history(texts[number].sequence)[:2]:
                    kept.fill_(torch.nan)  # as of a row that failed: the next one in its slot has nothing of it
                cache.forget(texts[number].sequence)
    return {number: torch.cat(parts) for number, parts in found.items()}


def _cut(texts: list[Text], who: list[int], part: int) -> Tensor:
    """The pack's states of one kind."""
    pieces = []
    for number in who:
        sequence = texts[number].sequence
        first = sequence.first_position
        pieces.append(texts[number].states[part][:, first + sequence.cached : first + len(sequence.tokens)])
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("in_vain", [0, 2**20])
@pytest.mark.parametrize("slots", [0, 2, 8])
@pytest.mark.parametrize("block", [5, 1000])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("window", "cap", "has_sinks"), [(None, None, False), (9, None, False), (None, None, True), (30, 2.0, False), (9, None, True)]
)
def test_each_sequence_sees_its_own_history(
    in_vain: int,
    slots: int,
    block: int,
    seed: int,
    window: int | None,
    cap: float | None,
    *,
    has_sinks: bool,
) -> None:
    """However a pack is cut, with windows, caps and sinks, alone or behind a beginning that others share, in slots or not."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    shared = Text(chance.choice((1, 20, 70)))
    texts = [shared, *(Text(chance.choice((1, 2, 17, 60)), parent=chance.choice((None, shared, shared))) for _ in range(6))]
    sinks = torch.randn(HEADS) if has_sinks else None
    wanted = [text.expected(window, cap, sinks) for text in texts]
    found = through_packs(texts, chance, block, Rule(scale=0.3, window=window, cap=cap, sinks_A=sinks), slots, Slots(in_vain))
    for number, expected in enumerate(wanted):
        assert torch.allclose(found[number], expected, atol=2e-5), f"text {number}"


@pytest.mark.parametrize("window", [None, 200])
def test_torchs_kernel_sees_what_all_scores_see(window: int | None) -> None:
    """Of many queries behind all keys the same averages and weights; none of it where a window hides some keys."""
    query, key, value = (torch.randn(heads, tokens, WIDTH) for heads, tokens in ((HEADS, 50), (KEY_HEADS, 60), (KEY_HEADS, 60)))
    rule, positions = Rule(scale=0.3, window=window), torch.arange(100, 150)
    assert attention.can_flash(query, value, rule, positions, 0)
    assert not attention.can_flash(query, value, Rule(scale=0.3, window=149), positions, 0)
    ours, plain = attention.flash(query, key, value, rule), attention.scored(query, key, value, rule, positions, 0)
    torch.testing.assert_close(ours.average_ALE, plain.average_ALE, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.weight_AL, plain.weight_AL, atol=1e-5, rtol=1e-5)


def test_neighbours_of_alike_lengths_are_read_together() -> None:
    """A group ends where another would have too much read in vain; slots between count, and one alone is none."""
    pack, slots = Pack(), Slots(bytes_of_a_call=100)
    lengths = {0: 10, 1: 12, 2: 30, 4: 29, 7: 31, 8: 31}
    steps = []
    for slot, tokens in lengths.items():
        sequence = TokenSequence(tokens=[0] * tokens, capacity=tokens, cached=tokens - 1)
        steps.append(Step(segment=pack.add(sequence, wanted=1, is_prompt=False), slot=slot, tokens=tokens))
    (block,) = pack.blocks(1000)
    found = slots.group(block, steps[::-1], (), torch.device("cpu"), 3)
    assert [(group.slots, group.tokens, group.are_equal) for group in found.groups] == [
        (slice(0, 2), 12, False),
        (slice(2, 5), 30, False),
        (slice(7, 9), 31, True),
    ]
    assert slots.known(block) is found
    second = found.groups[1]
    assert second.member_B is not None
    assert second.member_B.tolist() == [0, 2]
    seen = second.seen(None)
    assert seen is not None
    assert seen.sum(dim=-1).flatten().tolist()[::2] == [30, 29]
    alone = slots.group(pack.blocks(1000)[0], steps, (), torch.device("cpu"), 10**6)
    assert [group.slots for group in alone.groups] == [slice(7, 9)]
    assert [one.begin for one in alone.others] == [0, 1, 2, 3]


def test_what_was_taken_back_is_never_read() -> None:
    """Tokens that were tried in vain may not be numbers; behind a mask they would still spoil the row's own answer."""
    layer = ResidentLayer(slots=Slots())
    layer.expect(2, 50)
    short, long = (TokenSequence(tokens=[0] * tokens, capacity=50) for tokens in (10, 30))
    for row in (short, long):
        states = torch.randn(KEY_HEADS, len(row.tokens), WIDTH)
        layer.append(Arrival(sequence=row, start=0, is_prompt=True), states, states)
    tried = torch.full((KEY_HEADS, 3, WIDTH), torch.nan)
    layer.append(Arrival(sequence=short, start=10, is_prompt=False), tried, tried)
    layer.truncate(short, 10)
    pack = Pack()
    for row in (short, long):
        row.cached = len(row.tokens)
        row.tokens += [0]
        pack.add(row, wanted=1, is_prompt=False)
    (block,) = pack.blocks(100)
    (group,) = layer.grouping(block, torch.device("cpu")).groups
    layer.append_group(group, torch.randn(KEY_HEADS, 2, WIDTH), torch.randn(KEY_HEADS, 2, WIDTH))
    keys, values = layer.group_history(group)
    assert keys.shape == values.shape == (2, KEY_HEADS, 31, WIDTH)
    assert bool(keys.isfinite().all())
    assert bool(values.isfinite().all())
