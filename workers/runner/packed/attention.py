"""How does each sequence of a pack attend to its own history? This is the attention function of models that run in packs.

transformers lets a model's attention be computed by any function that is registered under a name. Ours finds the queries of the
whole block, which the model has computed in one piece, and what each sequence has in the cache. A lone sequence's part goes
through torch's fused attention. What that cannot compute is computed here in pieces of bounded size, so that memory grows with
the history and not with its square: a beginning that several sequences share, which their queries attend to together, sinks,
capped scores.

N tokens of the block, A query heads, H key heads, G = A / H, L queries of a sequence, T tokens of its history, D and E the
widths of keys and of values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from ollm_service.core.packing import MOST_CELLS
from workers.runner.kv.cache import PackCache
from workers.runner.kv.layer import History, HistoryLayer
from workers.runner.kv.resident import ResidentLayer
from workers.runner.kv.slots import Group
from workers.runner.packed.pack import Block, Segment

NAME = "ollm-packed"
# So few queries are laid out beside each other for each key head, which spares repeating the keys.
_FEW_QUERIES = 32
# Torch's fused attention on the CPU, which `scaled_dot_product_attention` calls, also tells each query's weight. None: not there.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How scores are made, besides by products: their scale, how far back a token sees, a cap, and a sink for each head [A].

    At most `most_cells` of them, or of the cells of a mask, are there at a time.
    """

    scale: float | None
    window: int | None = None
    cap: float | None = None
    sinks_A: Tensor | None = None
    most_cells: int = MOST_CELLS

    @property
    def is_plain(self) -> bool:
        """Whether torch's fused attention can compute it."""
        return self.cap is None and self.sinks_A is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What queries have seen of some keys: the average of the values [A, L, E], and the logarithm of the weights' sum [A, L]."""

    average_ALE: Tensor
    weight_AL: Tensor

    def of(self, places: slice | Tensor) -> "Part":
        """That of some of the queries."""
        return Part(average_ALE=self.average_ALE[:, places], weight_AL=self.weight_AL[:, places])


def attend_in_pack(  # noqa: PLR0913 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - each sequence sees its own history and nothing else
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    pack_cache: PackCache | None = None,
    **_others: Any,
) -> tuple[Tensor, None]:
    """Attention of a block: queries [1, A, N, D] to averages of values [1, N, A, E]. Registered with transformers as `NAME`."""
    assert pack_cache is not None, "a model that is attached to packs was run without one"
    pack_cache.attention_calls += 1
    rule = Rule(scale=scaling, window=sliding_window, cap=softcap, sinks_A=s_aux, most_cells=pack_cache.most_cells)
    layer = pack_cache.history_layer(_number_of(module))
    query_AND = query[0]
    heads, tokens, _ = query_AND.shape
    output_NAE = query.new_empty((tokens, heads, value.shape[-1]))
    shared = _attend_to_parents(query_AND, pack_cache.block, layer, rule, value.shape[-1])
    for group in pack_cache.grouping.groups:
        assert isinstance(layer, ResidentLayer)
        found_BAE = _attend_side_by_side(query_AND, group, layer, rule, shared)
        output_NAE[group.place_B] = found_BAE
    for one in pack_cache.grouping.others:
        if one.is_prompt and one.start == 0:  # all that it has of its own is here
            own = History(key[0, :, one.begin : one.end], value[0, :, one.begin : one.end], 0)
        else:
            own = layer.history(one.sequence)
        beginning = None if shared is None or one.sequence.parent is None else shared.of(slice(one.begin, one.end))
        found_ALE = _attend(query_AND[:, one.begin : one.end], one, own, rule, beginning)
        output_NAE[one.begin : one.end] = found_ALE.transpose(0, 1)
    return output_NAE.unsqueeze(0), None


AttentionInterface.register(NAME, attend_in_pack)


def _number_of(module: nn.Module) -> int:
    number = module.layer_idx
    assert isinstance(number, int)
    return number


def _attend_to_parents(query_AND: Tensor, block: Block, layer: HistoryLayer, rule: Rule, width: int) -> Part | None:
    """What the block's tokens see of the beginnings that they share, for the places of all; nothing where none is shared."""
    if not block.shared:
        return None
    heads, tokens, _ = query_AND.shape
    average_ANE = query_AND.new_zeros((heads, tokens, width))
    weight_AN = query_AND.new_full((heads, tokens), -torch.inf, dtype=torch.float32)
    for sharing in block.shared:
        keys_HTD, values_HTE, first = layer.history(sharing.parent)
        places_L, positions_L = sharing.places(query_AND.device), sharing.positions_L
        queries, earliest = query_AND.index_select(1, places_L), sharing.parent.first_position + first
        if can_flash(queries, values_HTE, rule, positions_L, earliest):
            part = flash(queries, keys_HTD, values_HTE, rule)
        else:
            part = scored(queries, keys_HTD, values_HTE, rule, positions_L, earliest)
        average_ANE.index_copy_(1, places_L, part.average_ALE)
        weight_AN.index_copy_(1, places_L, part.weight_AL)
    return Part(average_ALE=average_ANE, weight_AL=weight_AN)


def _attend_side_by_side(query_AND: Tensor, group: Group, layer: ResidentLayer, rule: Rule, shared: Part | None) -> Tensor:
    """Averages [B, A, E] of what a group's new tokens see, each of its own slot and of what it shares."""
    keys_SHTD, values_SHTE = layer.group_history(group)
    slots, key_heads = keys_SHTD.shape[:2]
    # The query heads that share keys are queries of one head, which spares repeating the keys.
    query_SHGD = query_AND[:, group.place_S].reshape(key_heads, -1, slots, query_AND.shape[-1]).permute(2, 0, 1, 3)
    seen = group.seen(rule.window)
    if rule.is_plain and shared is None:
        asked = _asked_twice(query_SHGD)
        found_SHGE = functional.scaled_dot_product_attention(asked, keys_SHTD, values_SHTE, attn_mask=seen, scale=rule.scale)
        found_SAE = found_SHGE[:, :, : query_SHGD.shape[2]].flatten(1, 2)
    else:
        own = side_by_side(query_SHGD, keys_SHTD, values_SHTE, rule, seen)
        parts = [own] if shared is None else [shared.of(group.place_S), own]
        found_SAE = combined(parts, rule.sinks_A).transpose(0, 1)
    return found_SAE if group.member_B is None else found_SAE.index_select(0, group.member_B)


def _asked_twice(query_SHGD: Tensor) -> Tensor:
    """A lone query for each head, twice where torch's kernel takes half the time for two: in bfloat16 on the CPU."""
    is_slow = query_SHGD.shape[2] == 1 and query_SHGD.dtype is torch.bfloat16 and query_SHGD.device.type == "cpu"
    return query_SHGD.repeat(1, 1, 2, 1) if is_slow else query_SHGD


def side_by_side(query_SHGD: Tensor, keys_SHTD: Tensor, values_SHTE: Tensor, rule: Rule, seen_S11T: Tensor | None) -> Part:
    """The part of one query for each query head and slot, slots in the place of queries: averages [A, S, E]."""
    if _has_flash(query_SHGD, values_SHTE, rule):
        assert _FLASH is not None
        hidden = None if seen_S11T is None else query_SHGD.new_zeros(seen_S11T.shape).masked_fill_(~seen_S11T, -torch.inf)
        asked, heads = _asked_twice(query_SHGD), query_SHGD.shape[2]
        average_SHGE, weight_SHG = _FLASH(asked, keys_SHTD, values_SHTE, attn_mask=hidden, scale=rule.scale)
        average_SHGE, weight_SHG = average_SHGE[:, :, :heads], weight_SHG[:, :, :heads]
    else:
        rows = max(1, rule.most_cells // (query_SHGD[0, :, :, 0].numel() * keys_SHTD.shape[2]))
        pieces = [
            _softmax(query_SHGD[at], keys_SHTD[at], values_SHTE[at], rule, None if seen_S11T is None else ~seen_S11T[at])
            for at in (slice(start, start + rows) for start in range(0, len(query_SHGD), rows))
        ]
        average_SHGE, weight_SHG = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Part(average_ALE=average_SHGE.flatten(1, 2).transpose(0, 1), weight_AL=weight_SHG.flatten(1, 2).transpose(0, 1))


def _attend(query_ALD: Tensor, segment: Segment, own: History, rule: Rule, shared: Part | None) -> Tensor:
    """Averages [A, L, E] of what one sequence's newest tokens see: their own history, and what they share."""
    keys_HTD, values_HTE, first = own.keys_HTD, own.values_HTD, own.first + segment.sequence.first_position
    if segment.is_prompt and segment.sequence.spans:
        assert rule.is_plain and shared is None and own.first == segment.start == 0, "a prompt with images is one piece"  # noqa: PT018
        return seeing_ahead(query_ALD, keys_HTD, values_HTE, rule, segment.sequence.spans)
    if rule.is_plain and shared is None:
        return fused(query_ALD, keys_HTD, values_HTE, rule, segment.first_position, first)
    positions = torch.arange(segment.first_position, segment.first_position + segment.length)
    part = scored(query_ALD, keys_HTD, values_HTE, rule, positions, first)
    return combined([part] if shared is None else [shared, part], rule.sinks_A)


def fused(query_ALD: Tensor, keys_HTD: Tensor, values_HTE: Tensor, rule: Rule, position: int, first: int) -> Tensor:
    """Torch's attention of queries from `position` on to keys from `first` on, the newest of which is the last query's own."""
    length, window = query_ALD.shape[1], rule.window
    if window is not None and position - first >= window:
        unseen = position - first - window + 1
        keys_HTD, values_HTE, first = keys_HTD[:, unseen:], values_HTE[:, unseen:], first + unseen
    tokens, groups = keys_HTD.shape[1], query_ALD.shape[0] // keys_HTD.shape[0]
    fits_window = window is None or tokens <= window
    if length == 1 or (length == tokens and fits_window):
        return functional.scaled_dot_product_attention(
            query_ALD.unsqueeze(0),
            keys_HTD.unsqueeze(0),
            values_HTE.unsqueeze(0),
            is_causal=length > 1,
            scale=rule.scale,
            enable_gqa=groups > 1,
        )[0]
    rows = max(1, rule.most_cells // tokens)
    if length > rows:
        ends = [min(start + rows, length) for start in range(0, length, rows)]
        starts = [0, *ends[:-1]]
        seen = [tokens - length + end for end in ends]
        pieces = [
            fused(query_ALD[:, start:end], keys_HTD[:, :last], values_HTE[:, :last], rule, position + start, first)
            for start, end, last in zip(starts, ends, seen, strict=True)
        ]
        return torch.cat(pieces, dim=1)
    mask_LT = visible(torch.arange(position, position + length, device=query_ALD.device), first, tokens, window)
    return _masked(query_ALD, keys_HTD, values_HTE, mask_LT, rule.scale)


def _masked(query_ALD: Tensor, keys_HTD: Tensor, values_HTE: Tensor, mask_LT: Tensor, scale: float | None) -> Tensor:
    heads, length, width = query_ALD.shape
    groups = heads // keys_HTD.shape[0]
    if groups > 1 and length <= _FEW_QUERIES:
        query_ALD, mask_LT = query_ALD.reshape(-1, groups * length, width), mask_LT.repeat(groups, 1)
    elif groups > 1:
        keys_HTD, values_HTE = keys_HTD.repeat_interleave(groups, dim=0), values_HTE.repeat_interleave(groups, dim=0)
    found = functional.scaled_dot_product_attention(
        query_ALD.unsqueeze(0), keys_HTD.unsqueeze(0), values_HTE.unsqueeze(0), attn_mask=mask_LT, scale=scale
    )
    return found[0].reshape(heads, length, -1)


def seeing_ahead(query_ALD: Tensor, keys_HTD: Tensor, values_HTE: Tensor, rule: Rule, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Attention inside a whole prompt, of which the tokens of a span see each other, too, as far as the window reaches."""
    tokens = keys_HTD.shape[1]
    group_T = torch.full((tokens,), -1, device=query_ALD.device)
    for number, (begin, end) in enumerate(spans):
        group_T[begin:end] = number
    place_T = torch.arange(tokens, device=query_ALD.device)
    rows = max(1, rule.most_cells // tokens)
    pieces = []
    for start in range(0, tokens, rows):
        place_L, group_L = place_T[start : start + rows, None], group_T[start : start + rows, None]
        mask_LT = (place_L >= place_T) | ((group_L == group_T) & (group_L >= 0))
        if rule.window is not None:
            mask_LT &= place_L - place_T < rule.window
        pieces.append(_masked(query_ALD[:, start : start + rows], keys_HTD, values_HTE, mask_LT, rule.scale))
    return torch.cat(pieces, dim=1)


def visible(positions_L: Tensor, first: int, tokens: int, window: int | None) -> Tensor:
    """Which of the keys at positions `first`, `first` + 1, … each query sees: [L, T], made where the positions are."""
    back_LT = positions_L.unsqueeze(-1) - torch.arange(first, first + tokens, device=positions_L.device)
    return back_LT >= 0 if window is None else (back_LT >= 0) & (back_LT < window)


def scored(query_ALD: Tensor, keys_HTD: Tensor, values_HTE: Tensor, rule: Rule, positions_L: Tensor, first: int) -> Part:
    """The queries' part from these keys.

    `positions_L` are on the CPU, so that no device has to be waited for to see whether a mask is needed.
    """
    heads, length, _ = query_ALD.shape
    rows = max(1, rule.most_cells // (heads * keys_HTD.shape[1]))
    pieces = [
        _scored_piece(query_ALD[:, start : start + rows], keys_HTD, values_HTE, rule, positions_L[start : start + rows], first)
        for start in range(0, length, rows)
    ]
    if len(pieces) == 1:
        return pieces[0]
    return Part(
        average_ALE=torch.cat([piece.average_ALE for piece in pieces], dim=1),
        weight_AL=torch.cat([piece.weight_AL for piece in pieces], dim=1),
    )


def _scored_piece(query_ALD: Tensor, keys_HTD: Tensor, values_HTE: Tensor, rule: Rule, positions_L: Tensor, first: int) -> Part:
    heads, length, width = query_ALD.shape
    key_heads, tokens, _ = keys_HTD.shape
    is_ahead = first + tokens - 1 > int(positions_L.min())
    is_behind = rule.window is not None and int(positions_L.max()) - first >= rule.window
    hidden_RT = None
    if is_ahead or is_behind:
        seen_LT = visible(positions_L.to(query_ALD.device, non_blocking=True), first, tokens, rule.window)
        hidden_RT = (~seen_LT).repeat(heads // key_heads, 1)
    average_HRE, weight_HR = _softmax(query_ALD.reshape(key_heads, -1, width), keys_HTD, values_HTE, rule, hidden_RT)
    return Part(average_ALE=average_HRE.reshape(heads, length, -1), weight_AL=weight_HR.reshape(heads, length))


def _softmax(query_HRD: Tensor, keys_HTD: Tensor, values_HTE: Tensor, rule: Rule, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
    """Averages [H, R, E] and weights [H, R] from all scores, but for those that are hidden, [R, T]; H may stand for several."""
    scale = query_HRD.shape[-1] ** -0.5 if rule.scale is None else rule.scale
    scores_HRT = ((query_HRD * scale) @ keys_HTD.transpose(-2, -1)).float()
    if rule.cap is not None:
        scores_HRT = (scores_HRT / rule.cap).tanh_().mul_(rule.cap)
    if hidden is not None:
        scores_HRT.masked_fill_(hidden, -torch.inf)
    weight_HR = scores_HRT.logsumexp(dim=-1)
    # A query that sees none of the keys has no average of them; its weight of zero leaves it out.
    shares_HRT = scores_HRT.sub_(weight_HR.clamp(min=torch.finfo(torch.float32).min).unsqueeze(-1)).exp_()
    return shares_HRT.to(values_HTE.dtype) @ values_HTE, weight_HR


def can_flash(query_ALD: Tensor, values_HTE: Tensor, rule: Rule, positions_L: Tensor, first: int) -> bool:
    """Whether `flash` computes what these queries see of keys that are all behind them, the oldest at position `first`.

    It needs no scores in memory. For few queries it is no faster.
    """
    if query_ALD.shape[1] <= _FEW_QUERIES or not _has_flash(query_ALD, values_HTE, rule):
        return False
    return rule.window is None or int(positions_L.max()) - first < rule.window


def _has_flash(query: Tensor, values: Tensor, rule: Rule) -> bool:
    """Whether torch has the kernel that tells weights, too, for such queries and values."""
    return _FLASH is not None and query.device.type == "cpu" and rule.cap is None and query.shape[-1] == values.shape[-1]


def flash(query_ALD: Tensor, keys_HTD: Tensor, values_HTE: Tensor, rule: Rule) -> Part:
    """The part of queries that see all of these keys, on the CPU. Heads that share keys are queries of one head."""
    assert _FLASH is not None
    heads, length, width = query_ALD.shape
    query_HRD = query_ALD.reshape(len(keys_HTD), -1, width)
    average_1HRE, weight_1HR = _FLASH(query_HRD.unsqueeze(0), keys_HTD.unsqueeze(0), values_HTE.unsqueeze(0), scale=rule.scale)
    return Part(average_ALE=average_1HRE[0].reshape(heads, length, -1), weight_AL=weight_1HR[0].reshape(heads, length))


def combined(parts: Sequence[Part], sinks_A: Tensor | None) -> Tensor:
    """The average over all parts [A, L, E]. A sink takes a share of the weight and adds nothing."""
    weights = [part.weight_AL for part in parts]
    if sinks_A is not None:
        weights.append(sinks_A.float().unsqueeze(-1).expand_as(weights[0]))
    elif len(parts) == 1:
        return parts[0].average_ALE
    shares_PAL1 = torch.stack(weights).softmax(dim=0).to(parts[0].average_ALE.dtype).unsqueeze(-1)
    whole_ALE = parts[0].average_ALE * shares_PAL1[0]
    for part, share_AL1 in zip(parts[1:], shares_PAL1[1:], strict=False):
        whole_ALE += part.average_ALE * share_AL1
    return whole_ALE
