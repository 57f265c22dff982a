"""How much memory does a micro-batch need, at the moment when it needs the most?

Two moments are compared, and the estimate is that of the larger: the last layer of the prompt's pass, and the last step of the
answer. All sizes are in bytes and above what the runner's process takes before it has a model (`RUNTIME_BYTES`).

  B rows · P tokens of the longest prompt · T tokens of the longest row with its answer · w bytes of an element · n layers
  H hidden size · I width of the feed-forward network · Q of all query heads · A heads · V vocabulary · E experts of a token
  F, S what a token leaves in layers of full and of sliding attention, K in the widest layer · W their window · R a row's state

weights      all tensors as loaded. Of layers that are not kept on the device, `DEVICE_SLOTS` times the largest instead: one
             computes while the next arrives
kv, prompt   B·(P·(F + S) + R). Sliding layers, too, hold the whole prompt: until the next token transformers keeps a view of it
             (`DynamicSlidingWindowLayer.update`)
kv, answer   B·(T·F + min(T, W)·S + R), and B·T·K / 2: a layer's keys are there twice while one token is added (`torch.cat`)
kv in files  while a prompt is written B·(P·S + R) and what attention gets of one layer, B·P·K; in a ring two more of its window.
             While a layer is read back B·T·K, in one piece; from a ring 3·B·min(T, window)·K: the file's bytes, keys and values,
             both with the new token. Besides a page on its way, B·`PAGE_TOKENS`·K, four where int8 is made or undone, and
             between the layers tails of at most `PAGE_TOKENS` or `MOST_TAIL_BYTES` a layer; a ring has neither
activations  of one layer over the prompt, the larger of
             its feed-forward part, B·P·(4·H + 3·I + 2·E·H)·w: the embeddings, the layer's input, the sum after attention, its
             norm; gate, up and product (four of them where GELU is computed in steps); the routed copies going in and out.
             With mlp-chunking, the part of I and E for one chunk, and B·P·H·w for what the chunks make;
             its attention, B·P·(3·H + 4·Q)·w: the rotation's temporaries, or keys and values repeated for all heads;
             linear attention's part, with D of all its heads: B·P·(3·H + 7·D)·w of projections, and in float32 over whole chunks
             of 64 positions 11·D and 3·64 for each head.
             In a step of the answer B·(4·H + 3·I)·w, of latent attention 4·B·T·Q·w, of linear attention three of its states
scores       models without SDPA in transformers compute A·B·P² scores of `_score_bytes` each; counted as activations
masks        1 byte for each of B·P² (w without SDPA), for full and sliding layers apart, and w more while attention runs. None
             where no row is padded: a lone row, unless its prompt fills the window
logits       B·V·(w + 1): of the last position, and whether each is a number. Rows that sample sort float32 copies:
             `SAMPLER_BYTES` more, in host memory
workspace    `WORKSPACE_BYTES`; on the CPU, where there is no other memory, the tokenizer, too: V·`TOKENIZER_BYTES`
host         on accelerators: the tokenizer, what sampling sorts, layers kept there, and `HOST_SLOTS` times the largest of those
             that come from disk
disk         B·T·F of the KV cache in files; of int8 a byte for each element and 4 for each head; of a ring B·min(T, window)·F

Sources: the modules of transformers 5.23 (sdpa_attention.py, masking_utils.py, cache_utils.py, the models themselves) and our
own runner, read, and compared with measured peaks by `bench/estimates.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ollm_service.core.options import KVCacheStrategy
from ollm_service.core.packing import EAGER_MODELS
from ollm_service.core.plan import GenericModelKind
from ollm_service.core.profile import ModelProfile
from ollm_service.core.tensors import ELEMENT_BYTES

MIB = 1024**2
# What a runner takes before it has a model: of host memory for the libraries, of an accelerator's for its context.
RUNTIME_BYTES: Mapping[str, int] = MappingProxyType({"cpu": 352 * MIB, "cuda": 512 * MIB, "mps": 0})
# Code and tables that are loaded with the first model, and the libraries' buffers; on CUDA those of cuBLAS.
WORKSPACE_BYTES: Mapping[str, int] = MappingProxyType({"cpu": 32 * MIB, "cuda": 64 * MIB, "mps": 64 * MIB})
TOKENIZER_BYTES = 640  # of an entry of the vocabulary, as byte pairs: its text, its merges, and tables both ways
SAMPLER_BYTES = 28  # of a logit: its float32 copy, the sorted ones, their order, and what top_p makes of them
DEVICE_SLOTS, HOST_SLOTS = 2, 3  # a layer computes while the next arrives; on the way from disk a third is being read
PAGE_TOKENS, MOST_TAIL_BYTES = 128, 8 * MIB  # the runner's own, from `workers/runner/kv`
SCALE_BYTES = 4  # of the numbers that one head keeps of a token in int8
USUAL_WINDOW_TOKENS = 256
# Those with latent attention: keys and values of all heads are computed from it for the whole history, a layer at a time.
LATENT_MODELS = frozenset({"deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "longcat_flash", "minicpm3"})
# How many tensors as wide as the feed-forward part's middle live at a time, where it is not gate, up and product: two where there
# is no gate, four where GELU is a formula of several steps or gate and up are one, nine with GPT-OSS's clamps and biases.
_MIDDLE_COPIES: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("opt", "gpt_neox", "falcon", "starcoder2", "gpt_bigcode", "bart", "xglm"), 2),
        **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "codegen", "phi", "bloom", "openai-gpt", "mt5", "longt5"), 4),
        **dict.fromkeys(("phi3", "phi4_multimodal", "glm", "glm4", "glm4v", "zamba2", "dia"), 4),
        "gpt_oss": 9,
    }
)
_PLAIN_SCORES = frozenset({"gemma2", "granite_swa", "granitemoe_swa", "vaultgemma", "t5gemma"})
_EXPERTS_COPIES, _GATED_COPIES = 4, 3
# The chunks in which the gated delta rule is computed (`chunk_size` of transformers' own implementation).
_DELTA_CHUNK = 64
_SPILLED = frozenset(KVCacheStrategy) - {KVCacheStrategy.RESIDENT}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a placement is expected to need, in bytes. `device_bytes` has to be free on the device, `host` and `disk` besides."""

    weights: int
    kv: int
    activations: int
    logits: int
    workspace: int
    disk: int
    masks: int = 0
    host: int = 0

    @property
    def device_bytes(self) -> int:
        """What has to be free on the device."""
        return self.weights + self.kv + self.activations + self.logits + self.masks + self.workspace


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a model runs, as far as memory depends on it.

    `device_kind` is `cpu`, `cuda` or `mps`; the layers that `host_layers` and `disk_layers` name pass through the device.
    `window_tokens` bounds a KV cache in a ring. `mlp_rows` are the positions that the feed-forward network computes at a time,
    None: all. `is_sampled`: some row may draw its tokens.
    """

    device_kind: str = "cpu"
    kv: KVCacheStrategy = KVCacheStrategy.RESIDENT
    window_tokens: int = USUAL_WINDOW_TOKENS
    mlp_rows: int | None = None
    is_sampled: bool = True
    host_layers: tuple[int, ...] = ()
    disk_layers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Moment:
    kv: int
    activations: int = 0
    masks: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        return self.kv + self.activations + self.masks + self.logits


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
    moment = max(_prompt(profile, layout, rows, prompt), _answer(profile, layout, rows, answer, prompt), key=lambda it: it.total)
    on_cpu = layout.device_kind == "cpu"
    tokenizer = profile.vocabulary_size * TOKENIZER_BYTES
    aside = [profile.layer_bytes[layer] for layer in (*layout.host_layers, *layout.disk_layers)]
    on_disk = [profile.layer_bytes[layer] for layer in layout.disk_layers]
    host = tokenizer + sum(aside) - sum(on_disk) + HOST_SLOTS * max(on_disk, default=0)
    if layout.is_sampled:
        host += rows * profile.vocabulary_size * SAMPLER_BYTES
    return MemoryEstimate(
        weights=profile.weight_bytes - sum(aside) + DEVICE_SLOTS * max(aside, default=0),
        kv=moment.kv,
        activations=moment.activations,
        logits=moment.logits,
        workspace=WORKSPACE_BYTES.get(layout.device_kind, 0) + tokenizer * on_cpu,
        disk=_on_disk(profile, layout, rows, tokens),
        masks=moment.masks,
        host=0 if on_cpu else host,
    )


def weight_element_bytes(profile: ModelProfile) -> int:
    """Bytes of one number in the dtype that the model computes in."""
    return ELEMENT_BYTES.get(profile.dtype or "", 4)


def _prompt(profile: ModelProfile, layout: Layout, rows: int, prompt: int) -> _Moment:
    """The last layer of the prompt's pass."""
    element, positions, hidden = weight_element_bytes(profile), rows * prompt, profile.hidden_size
    is_eager = profile.model_type in EAGER_MODELS
    cells = rows * prompt * prompt
    kept_masks = cells * _mask_count(profile, rows, prompt, is_eager=is_eager) * (element if is_eager else 1)
    running_masks = kept_masks if is_eager or not kept_masks else kept_masks + cells * element
    scores = cells * profile.attention_heads if is_eager else 0
    queries = profile.attention_width or hidden
    attention = positions * (3 * hidden + 4 * queries) * element + scores * _score_bytes(profile)
    chunk = positions if layout.mlp_rows is None else min(positions, layout.mlp_rows)
    chunked = 0 if chunk == positions else positions * hidden
    feed_forward = (positions * 4 * hidden + chunked + chunk * _middle_width(profile) + scores) * element
    turned = positions * _rotation_width(profile) * element
    kv = _prompt_kv(profile, layout, rows, prompt)
    return max(
        _Moment(kv=kv, activations=attention + turned, masks=running_masks),
        _Moment(kv=kv, activations=feed_forward + turned, masks=kept_masks),
        _Moment(kv=kv, activations=_delta_rule_bytes(profile, rows, prompt) + turned, masks=kept_masks),
        key=lambda moment: moment.total,
    )


def _middle_width(profile: ModelProfile) -> int:
    """Elements of a position that live in the feed-forward network at a time."""
    usual = _EXPERTS_COPIES if profile.expert_count else _GATED_COPIES
    middle = _MIDDLE_COPIES.get(profile.model_type or "", usual) * profile.intermediate_size
    routed = profile.experts_per_token * profile.hidden_size if profile.expert_count else 0
    return max(4 * routed, routed + middle)


def _delta_rule_bytes(profile: ModelProfile, rows: int, prompt: int) -> int:
    """What a layer of linear attention computes with: its projections, and all else in float32 over whole chunks."""
    if not profile.linear_heads:
        return 0
    padded = -(-prompt // _DELTA_CHUNK) * _DELTA_CHUNK
    width = profile.linear_heads * profile.linear_head_size
    projected = rows * prompt * (3 * profile.hidden_size + 7 * width) * weight_element_bytes(profile)
    return projected + rows * padded * (11 * width + 3 * _DELTA_CHUNK * profile.linear_heads) * 4


def _rotation_width(profile: ModelProfile) -> int:
    """Elements of a position's sines and cosines, for full and for sliding attention apart."""
    kinds = bool(profile.kv_bytes_per_token) + bool(profile.sliding_kv_bytes_per_token)
    return 2 * kinds * (profile.attention_width // profile.attention_heads if profile.attention_heads else 0)


def _score_bytes(profile: ModelProfile) -> int:
    """Bytes of one attention score, all copies that live at a time: the softmax in float32 beside its input, or three with sinks;
    more where heads have biases or slopes of their own."""
    element = weight_element_bytes(profile)
    if profile.model_type == "gpt_oss":
        return 3 * element
    return 8 if profile.model_type in _PLAIN_SCORES else 8 + 2 * element


def _mask_count(profile: ModelProfile, rows: int, prompt: int, *, is_eager: bool) -> int:
    """How many masks there are: of full and of sliding attention. SDPA needs none where no row is padded."""
    has_sliding = profile.sliding_kv_bytes_per_token > 0
    fills_window = profile.sliding_window is not None and prompt >= profile.sliding_window
    full = bool(profile.kv_bytes_per_token or not has_sliding) and (is_eager or rows > 1)
    sliding = has_sliding and (is_eager or rows > 1 or fills_window)
    return full + sliding


def _prompt_kv(profile: ModelProfile, layout: Layout, rows: int, prompt: int) -> int:
    if profile.kind is GenericModelKind.SEQ2SEQ_LM:
        return rows * profile.kv_bytes(1, prompt)
    a_row = prompt * (profile.kv_bytes_per_token + profile.sliding_kv_bytes_per_token) + profile.state_bytes_per_row
    if layout.kv in _SPILLED:
        in_window = 2 * min(prompt, layout.window_tokens) if layout.kv is KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER else 0
        a_row += (prompt + in_window) * _widest(profile) - prompt * profile.kv_bytes_per_token
    return rows * (a_row + _page_bytes(profile, layout, prompt))


def _answer(profile: ModelProfile, layout: Layout, rows: int, tokens: int, prompt: int) -> _Moment:
    """The last step of the longest row's answer."""
    element, hidden, widest = weight_element_bytes(profile), profile.hidden_size, _widest(profile)
    source = prompt if profile.kind is GenericModelKind.SEQ2SEQ_LM else 0
    kv = rows * profile.kv_bytes(tokens, source)
    seen = tokens if profile.kv_bytes_per_token or profile.sliding_window is None else min(tokens, profile.sliding_window)
    if layout.kv is KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER:
        kv += rows * (min(tokens, layout.window_tokens) * 3 * widest - tokens * profile.kv_bytes_per_token)
    elif layout.kv in _SPILLED:
        kv += rows * (tokens * (widest - profile.kv_bytes_per_token) + _page_bytes(profile, layout, tokens))
        full_layers = -(-profile.kv_bytes_per_token // widest) if widest else 0
        kv += full_layers * min(rows * min(tokens, PAGE_TOKENS) * widest, MOST_TAIL_BYTES)
    else:
        kv += rows * seen * widest // 2
    activations = rows * (4 * hidden + 3 * profile.intermediate_size) * element
    if profile.model_type in LATENT_MODELS:
        activations += rows * seen * 4 * profile.attention_width * element
    activations += rows * 3 * profile.linear_heads * profile.linear_head_size**2 * 4
    if profile.model_type in EAGER_MODELS:
        activations += rows * seen * (2 * profile.attention_width * element + profile.attention_heads * _score_bytes(profile))
    logit = element + 1
    if layout.is_sampled:
        logit += SAMPLER_BYTES if layout.device_kind == "cpu" else 4
    return _Moment(kv=max(kv, 0), activations=activations, logits=rows * profile.vocabulary_size * logit)


def _widest(profile: ModelProfile) -> int:
    """What a token leaves in the widest layer; in the average one where the profile does not say."""
    all_layers = profile.kv_bytes_per_token + profile.sliding_kv_bytes_per_token
    return profile.widest_kv_bytes_per_token or all_layers // max(1, profile.layer_count)


def _page_bytes(profile: ModelProfile, layout: Layout, tokens: int) -> int:
    """What one row has of a page that is being written or read."""
    copies = {KVCacheStrategy.PAGED: 1, KVCacheStrategy.QUANTIZED_COLD_TIER: 4}.get(layout.kv, 0)
    return copies * min(tokens, PAGE_TOKENS) * _widest(profile)


def _on_disk(profile: ModelProfile, layout: Layout, rows: int, tokens: int) -> int:
    """The KV cache in files; layers of sliding attention stay in memory."""
    if layout.kv not in _SPILLED:
        return 0
    if layout.kv is KVCacheStrategy.SLIDING_WINDOW_RING_BUFFER:
        return rows * min(tokens, layout.window_tokens) * profile.kv_bytes_per_token
    if layout.kv is KVCacheStrategy.QUANTIZED_COLD_TIER:
        elements = profile.kv_bytes_per_token // weight_element_bytes(profile)
        head_size = profile.attention_width // max(1, profile.attention_heads)
        return rows * tokens * (elements + SCALE_BYTES * -(-elements // max(1, head_size)))
    return rows * tokens * profile.kv_bytes_per_token
