"""What does a forward pass work with, beside weights and cache? Widths of one model, and what lives at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ollm_service.core.layout import Layout
from ollm_service.core.passing import tile_rows
from ollm_service.core.profile import ModelProfile

SAMPLER_BYTES = 28  # of a logit: its float32 copy, the sorted ones, their order, and what top_p makes of them
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What lives at one moment, in bytes."""

    kv: int
    activations: int = 0
    masks: int = 0
    logits: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.kv + self.activations + self.masks + self.logits


def middle_width(profile: ModelProfile) -> int:
    """Elements of a position that live in the feed-forward network at a time."""
    usual = _EXPERTS_COPIES if profile.expert_count else _GATED_COPIES
    middle = _MIDDLE_COPIES.get(profile.model_type or "", usual) * profile.intermediate_size
    routed = profile.experts_per_token * profile.hidden_size if profile.expert_count else 0
    return max(4 * routed, routed + middle)


def delta_rule_bytes(profile: ModelProfile, rows: int, prompt: int) -> int:
    """What a layer of linear attention computes with: its projections, and all else in float32 over whole chunks."""
    if not profile.linear_heads:
        return 0
    padded = -(-prompt // _DELTA_CHUNK) * _DELTA_CHUNK
    width = profile.linear_heads * profile.linear_head_size
    projected = rows * prompt * (3 * profile.hidden_size + 7 * width) * profile.element_bytes
    return projected + rows * padded * (11 * width + 3 * _DELTA_CHUNK * profile.linear_heads) * 4


def rotation_width(profile: ModelProfile) -> int:
    """Elements of a position's sines and cosines, for full and for sliding attention apart."""
    kinds = bool(profile.kv_bytes_per_token) + bool(profile.sliding_kv_bytes_per_token)
    return 2 * kinds * (profile.attention_width // profile.attention_heads if profile.attention_heads else 0)


def score_bytes(profile: ModelProfile) -> int:
    """Bytes of one attention score, all copies that live at a time: the softmax in float32 beside its input, or three with sinks;
    more where heads have biases or slopes of their own."""
    element = profile.element_bytes
    if profile.model_type == "gpt_oss":
        return 3 * element
    return 8 if profile.model_type in _PLAIN_SCORES else 8 + 2 * element


def widest(profile: ModelProfile) -> int:
    """What a token leaves in the widest layer; in the average one where the profile does not say."""
    all_layers = profile.kv_bytes_per_token + profile.sliding_kv_bytes_per_token
    return profile.widest_kv_bytes_per_token or all_layers // max(1, profile.layer_count)


def logits_bytes(profile: ModelProfile, layout: Layout, places: int, rows: int, beside: int) -> int:
    """Of `places` positions: in the model's dtype, `beside` more of each, and what rows that sample sort.

    Where the head comes in tiles, one tile's are there twice.
    """
    element = profile.element_bytes
    found = places * profile.vocabulary_size * (element + beside)
    if layout.is_sampled:
        found += rows * profile.vocabulary_size * (SAMPLER_BYTES if layout.device_kind == "cpu" else 4)
    if layout.vocabulary_on_disk:
        found += places * min(profile.vocabulary_size, tile_rows(max(1, profile.hidden_size * element))) * element
    return found
