"""How much memory do rows need, at the moment when they need the most?

Of rows that share packs that is a pass in which prompts are computed while all others are as long as they become; of rows side
by side the larger of two, the last layer of the prompt's pass and the last step of the answer. All sizes are in bytes and above
what the runner's process takes before it has a model (`RUNTIME_BYTES`).

  B rows · P tokens of the longest prompt · T tokens of the longest row with its answer · w bytes of an element · n layers
  H hidden size · I width of the feed-forward network · Q of all query heads · A heads · V vocabulary · E experts of a token
  F, S what a token leaves in layers of full and of sliding attention, K in the widest layer · W their window · R a row's state
  N tokens of a pack, B·P but at most `MOST_PACK_TOKENS` or one prompt, and M more · b of a block, at most `BLOCK_TOKENS`

weights      all tensors as loaded. Of layers that are not kept on the device, `DEVICE_SLOTS` times the largest instead: one
             computes while the next arrives. With moe-routing they pass without their experts, and of those `EXPERT_SLOTS`
             times the largest. Where the vocabulary stays on disk, neither the embedding nor the head, of which tiles of
             `TILE_BYTES` pass through the slots of the layers
workspace    `WORKSPACE_BYTES`; on the CPU, where there is no other memory, the tokenizer, too: V·`TOKENIZER_BYTES`; and
             `COMPILED_BYTES` where experts come one by one in half precision, whose products are compiled by shape
host         on accelerators: the tokenizer, what sampling sorts, layers kept there, and `HOST_SLOTS` times the largest of those
             that come from disk
in packs
kv           B·(T·F + s·S + R). Sliding layers keep s = min(T, 2·W), or, of a prompt in blocks, min(P, W + `BLOCK_TOKENS`).
             A beginning that rows may share has s·S + R of its own, where rows are longer than s
kv in files  B·(s·S + R), tails of a page and `MOST_TRIED_TOKENS` + 1 tokens, B·(page + 16)·F, and of one row in one layer its
             history (T + `PAGE_TOKENS`)·K, in a ring its window and two pages, or two prompts that come in blocks; besides
             a page on its way, four where int8 is made or undone. A page is `PAGE_TOKENS`, T, or `MOST_TAIL_BYTES` / (B·K);
             counted once, that of a lone row
activations  of one layer over a block, the larger of
             its feed-forward part, b·(4·H + 3·I + 2·E·H)·w: what comes in, the sum after attention, its norm; gate, up, product
             (four of them where GELU is computed in steps); the routed copies going in and out. With mlp-chunking, the part of
             I and E for one chunk, and b·H·w for what the chunks make;
             its attention, b·(3·H + 4·Q)·w: the rotation's temporaries, queries and what becomes of them;
             linear attention's part of one prompt, with D of all its heads: P·(3·H + 7·D)·w of projections, and in float32 over
             whole chunks of 64 positions 11·D and 3·64 for each head; or three of the states of all rows.
             Where a pack has several blocks its embeddings, a layer's input and its output besides, 3·N·H·w
scores       A·b·P of 8 bytes, w = 2: 12, at most `MOST_CELLS` of them: where rows may share a beginning, and for models without
             SDPA in transformers; counted as activations
masks        b·P, at most `MOST_CELLS`, of 1 + w bytes, where a prompt is longer than a block or a window, and its keys and values
             for all heads, 2·P·Q·w
logits       M·V·w of M places: one for each row, up to 16 with those that are tried, `MOST_TRIED_IN_PASS` of all rows. Rows that
             sample sort float32 copies: `SAMPLER_BYTES` more, in host memory. Where the head comes in tiles, M·w for each row of
             one
disk         of the KV cache in files B·(T + 2·page)·F, a page of it for beginnings that rows share; B·(T + page) of int8, a
             byte for each element and 4 for each head; of a ring B·(min(T, window + page) + page)·F
extents      where the weights are to be laid out by layers first, of the cache disk, too: all of them, and as much again of those
             that transformers joins or unpacks, until that is done and before the KV cache is there
loading      where experts are joined then, of host memory, before anything else of the model is there: five thirds of one layer's
             experts, the tokenizer and `WORKSPACE_BYTES` of the CPU
side by side
kv, prompt   B·(P·(F + S) + R). Sliding layers, too, hold the whole prompt: until the next token transformers keeps a view of it
             (`DynamicSlidingWindowLayer.update`)
kv, answer   B·(T·F + min(T, W)·S + R), and B·T·K / 2: a layer's keys are there twice while one token is added (`torch.cat`)
activations  as in packs, with b = B·P. In a step of the answer B·(4·H + 3·I)·w, of latent attention 4·B·T·Q·w, of linear
             attention three of its states
scores       models without SDPA in transformers compute A·B·P² scores of `score_bytes` each; counted as activations
masks        1 byte for each of B·P² (w without SDPA), for full and sliding layers apart, and w more while attention runs. None
             where no row is padded: a lone row, unless its prompt fills the window
logits       B·V·(w + 1): of the last position, and whether each is a number

Sources: the modules of transformers 5.23 (sdpa_attention.py, masking_utils.py, cache_utils.py, the models themselves) and our
own runner, read, and compared with measured peaks by `bench/estimates.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ollm_service.core.laying_out import extents_bytes, joined_bytes, joining_host_bytes
from ollm_service.core.layout import Layout
from ollm_service.core.pack_memory import kv_file_bytes, pack_moment
from ollm_service.core.padded_memory import answer_moment, prompt_moment
from ollm_service.core.passing import (
    HOST_SLOTS,
    MIB,
    slots_bytes,
    tile_bytes,
    vocabulary_bytes,
)
from ollm_service.core.plan import GenericModelKind
from ollm_service.core.profile import ModelProfile
from ollm_service.core.working_memory import SAMPLER_BYTES

# What a runner takes before it has a model: of host memory for the libraries, of an accelerator's for its context.
RUNTIME_BYTES: Mapping[str, int] = MappingProxyType({"cpu": 352 * MIB, "cuda": 512 * MIB, "mps": 0})
# Code and tables that are loaded with the first model, and the libraries' buffers; on CUDA those of cuBLAS.
WORKSPACE_BYTES: Mapping[str, int] = MappingProxyType({"cpu": 32 * MIB, "cuda": 64 * MIB, "mps": 64 * MIB})
TOKENIZER_BYTES = 640  # of an entry of the vocabulary, as byte pairs: its text, its merges, and tables both ways
COMPILED_BYTES = 24 * MIB  # of oneDNN: products of some forty numbers of tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a placement is expected to need, in bytes. `device_bytes` has to be free on the device, `host` besides.

    Of the cache disk `disk` is for the KV cache, `extents` for weights that have yet to be laid out by layers, and `joined` for
    what lies beside them until that is done; `disk_bytes` has to be free there. `loading` is what that takes of host memory,
    instead of all else since it comes before: the larger counts.
    """

    weights: int
    kv: int
    activations: int
    logits: int
    workspace: int
    disk: int
    masks: int = 0
    host: int = 0
    extents: int = 0
    joined: int = 0
    loading: int = 0

    @property
    def device_bytes(self) -> int:
        """What has to be free on the device."""
        return self.weights + self.kv + self.activations + self.logits + self.masks + self.workspace

    @property
    def disk_bytes(self) -> int:
        """What has to be free on the cache disk: rows begin when nothing lies beside the extents any more."""
        return self.extents + max(self.disk, self.joined)


def estimate_memory(
    profile: ModelProfile, layout: Layout, *, rows: int, tokens: int, prompt_tokens: int | None = None
) -> MemoryEstimate:
    """What `rows` rows of up to `tokens` tokens need, prompt and answer together, of which the prompt has up to `prompt_tokens`.

    Without `prompt_tokens` all may be prompt. More rows or more tokens never need less.
    """
    prompt = tokens if prompt_tokens is None else min(prompt_tokens, tokens)
    answer = tokens
    if profile.kind is GenericModelKind.SEQ2SEQ_LM and prompt_tokens is not None:
        answer = tokens - prompt
    if layout.is_packed:
        moment = pack_moment(profile, layout, rows, tokens, prompt)
    else:
        moments = prompt_moment(profile, layout, rows, prompt), answer_moment(profile, layout, rows, answer, prompt)
        moment = max(moments, key=lambda it: it.total)
    on_cpu = layout.device_kind == "cpu"
    host = _tokenizer(profile) + sum(profile.layer_bytes[layer] for layer in layout.host_layers) + _reading_bytes(profile, layout)
    if layout.is_sampled:
        host += rows * profile.vocabulary_size * SAMPLER_BYTES
    return MemoryEstimate(
        weights=_weights(profile, layout),
        kv=moment.kv,
        activations=moment.activations,
        logits=moment.logits,
        workspace=_workspace(profile, layout),
        disk=kv_file_bytes(profile, layout.kv, rows=rows, tokens=tokens, window_tokens=layout.window_tokens),
        masks=moment.masks,
        host=0 if on_cpu else host,
        extents=extents_bytes(profile) * layout.lays_out,
        joined=joined_bytes(profile) * layout.lays_out,
        loading=_loading_bytes(profile) * layout.lays_out,
    )


def _workspace(profile: ModelProfile, layout: Layout) -> int:
    """What is there beside the model and its work."""
    given = WORKSPACE_BYTES.get(layout.device_kind, 0)
    if layout.device_kind != "cpu":
        return given
    is_compiled = layout.is_routed and profile.expert_count > 0 and profile.element_bytes < 4
    return given + _tokenizer(profile) + COMPILED_BYTES * is_compiled


def _tokenizer(profile: ModelProfile) -> int:
    return profile.vocabulary_size * TOKENIZER_BYTES


def _weights(profile: ModelProfile, layout: Layout) -> int:
    """What stays on the device, and the slots through which the rest passes."""
    aside = (*layout.host_layers, *layout.disk_layers)
    gone = sum(profile.layer_bytes[layer] for layer in aside) + vocabulary_bytes(profile) * layout.vocabulary_on_disk
    slots = slots_bytes(profile, aside, is_routed=layout.is_routed, vocabulary_on_disk=layout.vocabulary_on_disk)
    return profile.weight_bytes - gone + slots


def _loading_bytes(profile: ModelProfile) -> int:
    """Host memory in which experts are joined while the weights are laid out."""
    joining = joining_host_bytes(profile)
    return joining + _tokenizer(profile) + WORKSPACE_BYTES["cpu"] if joining else 0


def _reading_bytes(profile: ModelProfile, layout: Layout) -> int:
    """Host memory in which layers from disk arrive."""
    if not layout.disk_layers:
        return 0
    tile = tile_bytes(profile) * layout.vocabulary_on_disk
    return HOST_SLOTS * max(tile, *(profile.layer_bytes[layer] for layer in layout.disk_layers))
