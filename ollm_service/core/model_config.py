"""What does a config.json say of a model's shape? Hostile input: whatever is missing or absurd counts as not said."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from ollm_service.core.quantization import quantization_of
from ollm_service.core.tensors import ELEMENT_BYTES, FLOATS, Tensor

MOST_LAYERS = 10_000
_LARGEST_FACT = 2**40
_AROUND_AN_IMAGE = 8  # a token before and one behind, and line breaks
_NESTED_TEXT = ("text_config", "llm_config", "language_config", "decoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A parsed config.json. `text` is the part that describes the language model, which may be the whole."""

    whole: Mapping[str, Any]
    text: Mapping[str, Any]

    @classmethod
    def read(cls, whole: Mapping[str, Any]) -> Self:
        """Find the language model's part."""
        nested = next((whole[key] for key in _NESTED_TEXT if isinstance(whole.get(key), dict)), None)
        return cls(whole=whole, text=whole if nested is None else nested)

    def fact(self, *names: str) -> int:
        """The first of these of the language model that is a sensible positive whole number, else 0."""
        for name in names:
            value = self.text.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _LARGEST_FACT:
                return value
        return 0

    def flag(self, name: str) -> bool | None:
        """True or false where the language model's part says so, else None."""
        value = self.text.get(name)
        return value if isinstance(value, bool) else None

    def words(self, *names: str) -> tuple[str, ...]:
        """The first of these that is a list of texts, else nothing."""
        for name in names:
            value = self.text.get(name)
            if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
                return tuple(value[:MOST_LAYERS])
        return ()

    @property
    def architecture(self) -> str | None:
        """The first architecture that it names."""
        names = self.whole.get("architectures")
        first = names[0] if isinstance(names, list) and names else None
        return first if isinstance(first, str) and first.isidentifier() and len(first) <= 128 else None

    @property
    def model_type(self) -> str | None:
        """transformers' name for the whole model."""
        return _text(self.whole, "model_type")

    @property
    def text_type(self) -> str:
        """transformers' name for the language model."""
        return _text(self.text, "model_type") or self.model_type or ""

    @property
    def quantization(self) -> str | None:
        """How the weights were quantized, if they were."""
        return quantization_of(self.quantization_scheme)

    @property
    def quantization_scheme(self) -> Mapping[str, Any]:
        """The `quantization_config` as it stands there; empty where there is none."""
        scheme = self.whole.get("quantization_config")
        return scheme if isinstance(scheme, dict) else {}

    @property
    def layer_count(self) -> int:
        """Decoder layers; 0 where it does not say."""
        names = ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
        count = self.fact(*names)
        return count if count <= MOST_LAYERS else 0

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.fact("hidden_size", "n_embd", "d_model", "dim")

    @property
    def heads(self) -> int:
        """Query heads of a decoder layer."""
        return self.fact("decoder_attention_heads", "num_attention_heads", "n_head", "n_heads", "num_heads")

    @property
    def key_value_heads(self) -> int:
        """Key-value heads of a decoder layer."""
        if self.flag("multi_query") and not self.flag("new_decoder_architecture"):
            return 1
        return self.fact("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv") or self.heads

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.fact("head_dim", "d_kv") or (-(-self.hidden_size // self.heads) if self.heads else 0)

    @property
    def intermediate_size(self) -> int:
        """Width of the middle of the feed-forward network that one token passes: of all its experts together."""
        dense = self.fact("decoder_ffn_dim", "intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size")
        # Where experts have no width of their own, as in Mixtral and GPT-OSS, the one that is named is theirs.
        expert = self.fact("moe_intermediate_size") or (dense if self.expert_count else 0)
        return max(dense, expert * self.experts_per_token) or 4 * self.hidden_size

    @property
    def expert_count(self) -> int:
        """Routed experts of a layer."""
        return self.fact("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

    @property
    def experts_per_token(self) -> int:
        """Routed experts that one token passes."""
        return self.fact("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_top_k", "top_k_experts")

    @property
    def context_tokens(self) -> int | None:
        """The longest context that it was made for."""
        return self.fact("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx") or None

    @property
    def image_tokens(self) -> int:
        """Tokens of an image with what stands around it, where every image has as many; else 0."""
        count = self.whole.get("mm_tokens_per_image")
        if not isinstance(count, int) or isinstance(count, bool) or not 0 < count < _LARGEST_FACT:
            return 0
        return count + _AROUND_AN_IMAGE

    def dtype(self, tensors: Iterable[Tensor]) -> str | None:
        """The element type in which the model is loaded: what the configuration says, else that of most weights."""
        for source in (self.whole, self.text):
            for key in ("dtype", "torch_dtype"):
                value = source.get(key)
                if isinstance(value, str) and value.removeprefix("torch.") in ELEMENT_BYTES:
                    return value.removeprefix("torch.")
        counts: Counter[str] = Counter()
        for tensor in tensors:
            if tensor.dtype in FLOATS:
                counts[FLOATS[tensor.dtype]] += tensor.element_count
        return max(counts, key=lambda dtype: (counts[dtype], dtype), default=None)


def _text(source: Mapping[str, Any], key: str) -> str | None:
    value = source.get(key)
    return value if isinstance(value, str) else None
