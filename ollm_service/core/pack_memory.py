"""What does a forward pass of rows work with that share a pack, and what do their keys and values take in files?

`core/estimates.py` has the formulae in one place.
"""

from ollm_service.core.layout import IN_FILES, MOST_TAIL_BYTES, PAGE_TOKENS, Layout
from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.packing import (
    BLOCK_TOKENS,
    EAGER_MODELS,
    MOST_CELLS,
    MOST_PACK_TOKENS,
    MOST_TRIED_IN_PASS,
    MOST_TRIED_TOKENS,
)
from ollm_service.core.profile import ModelProfile
from ollm_service.core.working_memory import Moment, delta_rule_bytes, logits_bytes, middle_width, rotation_width, widest

SCALE_BYTES = 4  # of the numbers that one head keeps of a token in int8


def pack_moment(profile: ModelProfile, layout: Layout, rows: int, tokens: int, prompt: int) -> Moment:
    """A pass in which prompts are computed while all other rows are as long as they become."""
    kv = _kv(profile, layout, rows, tokens, prompt)
    steps = _most_steps(rows)
    pack = max(min(rows * prompt, max(MOST_PACK_TOKENS, prompt) + steps), steps)
    block = min(pack, BLOCK_TOKENS)
    element, hidden = profile.element_bytes, profile.hidden_size
    # A pack of several blocks is there whole: its embeddings, what a layer is given and what it makes of it.
    whole = pack * rotation_width(profile) * element + (3 * pack * hidden * element if pack > block else 0)
    work = max(_attention(profile, block), _feed_forward(profile, layout, block), _linear(profile, rows, prompt, block))
    scores = _score_bytes(profile, layout, prompt, block)
    masks = _mask_bytes(profile, prompt)
    layers = Moment(kv=kv, activations=whole + work + scores, masks=masks)
    logits = logits_bytes(profile, layout, places=steps, rows=rows, beside=0)
    head = Moment(kv=kv, activations=whole + steps * hidden * element, logits=logits)
    return max(layers, head, key=lambda moment: moment.total)


def _most_steps(rows: int) -> int:
    """Tokens of rows that have begun, with those that are tried in advance."""
    return max(rows, min(rows * (1 + MOST_TRIED_TOKENS), MOST_TRIED_IN_PASS))


def _attention(profile: ModelProfile, block: int) -> int:
    queries = profile.attention_width or profile.hidden_size
    return block * (3 * profile.hidden_size + 4 * queries) * profile.element_bytes


def _feed_forward(profile: ModelProfile, layout: Layout, block: int) -> int:
    chunk = block if layout.mlp_rows is None else min(block, layout.mlp_rows)
    chunked = 0 if chunk == block else block * profile.hidden_size
    return (block * 4 * profile.hidden_size + chunked + chunk * middle_width(profile)) * profile.element_bytes


def _linear(profile: ModelProfile, rows: int, prompt: int, block: int) -> int:
    """Of prompts one at a time; of rows with a token each their states side by side, before and after."""
    states = rows * 3 * profile.linear_heads * profile.linear_head_size**2 * 4
    alone = delta_rule_bytes(profile, 1, min(prompt, BLOCK_TOKENS))
    return (max(alone, states) + block * 2 * profile.hidden_size * profile.element_bytes) if profile.linear_heads else 0


def _score_bytes(profile: ModelProfile, layout: Layout, prompt: int, block: int) -> int:
    """Scores that are computed here: of models that need it, and wherever rows may share a beginning.

    Rows share one also where they run one at a time.
    """
    if not layout.shares_beginnings and profile.model_type not in EAGER_MODELS:
        return 0
    cells = min(max(1, profile.attention_heads) * block * prompt, MOST_CELLS)
    return cells * (8 if profile.element_bytes >= 4 else 8 + 2 * profile.element_bytes)


def _mask_bytes(profile: ModelProfile, prompt: int) -> int:
    """One mask at a time: of a block that sees what came before it, or of a prompt that is longer than a window."""
    fills_window = profile.sliding_window is not None and prompt > profile.sliding_window
    if prompt <= BLOCK_TOKENS and not fills_window:
        return 0
    cells = min(min(prompt, BLOCK_TOKENS) * prompt, MOST_CELLS)
    repeated = 2 * prompt * (profile.attention_width or profile.hidden_size) * profile.element_bytes
    return cells * (1 + profile.element_bytes) + repeated


def _kv(profile: ModelProfile, layout: Layout, rows: int, tokens: int, prompt: int) -> int:
    sliding = tokens
    if profile.sliding_window is not None:
        kept = max(min(tokens, 2 * profile.sliding_window), min(prompt, profile.sliding_window + BLOCK_TOKENS))
        sliding = min(tokens, kept)
    # A beginning that rows share keeps a window, and states, beside theirs; of full layers no token is kept twice.
    beginnings = 1 if layout.shares_beginnings else 0
    bounded = min(rows * tokens, (rows + beginnings) * sliding) * profile.sliding_kv_bytes_per_token
    bounded += (rows + beginnings) * profile.state_bytes_per_row
    if layout.kv not in IN_FILES:
        return rows * tokens * profile.kv_bytes_per_token + bounded
    a_token = widest(profile)
    # The more rows the smaller are pages, in whole tokens: rounded for all rows together, so that more never need less.
    most_tail = MOST_TAIL_BYTES // max(1, a_token)
    page = max(1, min(PAGE_TOKENS, tokens, most_tail))
    in_tails = max(rows, min(rows * min(PAGE_TOKENS, tokens), most_tail)) + rows * (MOST_TRIED_TOKENS + 1)
    tails = in_tails * profile.kv_bytes_per_token
    seen = tokens if layout.kv is not KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER else min(tokens, layout.window_tokens + 2 * page)
    open_prompts = 2 * prompt if prompt > BLOCK_TOKENS else 0
    pages = 4 if layout.kv is KVCacheStrategy.QUANTIZED_COLD_TIER else 1
    return bounded + tails + (max(seen + PAGE_TOKENS, open_prompts) + pages * page) * a_token


def kv_file_bytes(profile: ModelProfile, kv: KVCacheStrategy, *, rows: int, tokens: int, window_tokens: int) -> int:
    """What the files of a KV cache take at most, for so many rows of so many tokens; 0 where the profile does not tell.

    The page in which a prompt ends has the place of a full one. So have that in which a beginning ends that rows share, and in a
    ring that which is being left. Layers of sliding attention stay in memory.
    """
    if kv not in IN_FILES:
        return 0
    page = min(tokens, PAGE_TOKENS)
    kept = tokens if kv is not KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER else min(tokens, window_tokens + page)
    a_token = profile.kv_bytes_per_token
    if kv is KVCacheStrategy.QUANTIZED_COLD_TIER:
        # A byte for each element, and a scale for as many of them as a head is wide.
        elements = profile.kv_bytes_per_token // profile.element_bytes
        head_size = profile.attention_width // max(1, profile.attention_heads)
        a_token = elements + SCALE_BYTES * -(-elements // max(1, head_size))
    begun = 2 if kv is KVCacheStrategy.PAGED else 1  # beginnings are shared only where every token is kept as it was
    return rows * (kept + begun * page) * a_token
