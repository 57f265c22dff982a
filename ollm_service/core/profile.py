"""What does inspection learn of a model, from its configuration and its weight files' headers alone?"""

from dataclasses import dataclass
from pathlib import PurePosixPath

from ollm_service.core.content import MOST_IMAGE_TOKENS
from ollm_service.core.plan import GenericModelKind, ModelModality, NativeFamily
from ollm_service.core.tensors import ELEMENT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """One model in one worker's models root.

    Sizes are in bytes, lengths in tokens. `digest` is the sha256 over weights, configuration, tokenizer and chat template: equal
    digests are equal models. `refs` are the branches and tags that name `revision`, as far as the folder knows.
    `unsafe_because` says why the folder is refused; such a model is never planned. `has_processor`: a processor's or
    preprocessor's configuration is there. `has_gds_export`: there is a raw export of
    its weights that may be read; `gds_export_problem` says why one that is there may not.

    `quantization` is the method by which its weights were packed, if they were.

    Weights, as loaded in `dtype`: `weight_bytes` all of them; `layer_bytes` each decoder layer, routed experts included, empty
    where the layers cannot be told apart; `embedding_bytes` the input embeddings, positions among them; `head_bytes` the output
    head, 0 where it is the embedding; `expert_bytes` all routed experts of all layers, `layer_expert_bytes` those of each. The
    rest is towers, encoders and norms. `joined_bytes` are those that transformers joins of several tensors or unpacks as it loads
    them, None where an older release has inspected the model.

    What one row keeps: `kv_bytes_per_token` the layers of full attention, `sliding_kv_bytes_per_token` those that look back
    `sliding_window` tokens, `state_bytes_per_row` the recurrent and convolution states of layers without attention, and
    `cross_kv_bytes_per_token` what a decoder keeps of each token of its source; `widest_kv_bytes_per_token` the one layer whose
    keys and values are the widest. `attention_width` is that of a layer's queries, all heads together; `linear_heads` and
    `linear_head_size` are those of layers of linear attention by the gated delta rule. `image_tokens` are what an image becomes,
    0 where that depends on the image or is not known.
    """

    name: str
    path: PurePosixPath
    digest: str
    architecture: str | None = None
    model_type: str | None = None
    family: NativeFamily | None = None
    kind: GenericModelKind | None = None
    modalities: tuple[ModelModality, ...] = (ModelModality.TEXT,)
    requires_processor: bool = False
    has_processor: bool = False
    dtype: str | None = None
    quantization: str | None = None
    weight_bytes: int = 0
    parameter_count: int = 0
    layer_count: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    vocabulary_size: int = 0
    attention_heads: int = 0
    attention_width: int = 0
    linear_heads: int = 0
    linear_head_size: int = 0
    layer_bytes: tuple[int, ...] = ()
    embedding_bytes: int = 0
    head_bytes: int = 0
    expert_bytes: int = 0
    layer_expert_bytes: tuple[int, ...] = ()
    joined_bytes: int | None = None
    expert_count: int = 0
    experts_per_token: int = 0
    kv_bytes_per_token: int = 0
    sliding_kv_bytes_per_token: int = 0
    sliding_window: int | None = None
    state_bytes_per_row: int = 0
    cross_kv_bytes_per_token: int = 0
    widest_kv_bytes_per_token: int = 0
    max_context_tokens: int | None = None
    image_tokens: int = 0
    has_chat_template: bool = False
    has_gds_export: bool = False
    gds_export_problem: str | None = None
    repo_id: str | None = None
    revision: str | None = None
    refs: tuple[str, ...] = ()
    unsafe_because: str | None = None

    def __post_init__(self) -> None:
        if self.path.is_absolute() or ".." in self.path.parts:
            raise ValueError(f"a profile's path must stay inside the models root: {self.path}")

    @property
    def is_usable(self) -> bool:
        """Whether the folder is safe and complete enough to be loaded."""
        return self.unsafe_because is None

    @property
    def element_bytes(self) -> int:
        """Bytes of one number in the dtype that the model computes in."""
        return ELEMENT_BYTES.get(self.dtype or "", 4)

    @property
    def other_bytes(self) -> int:
        """The weights that are neither decoder layers nor embeddings nor head: towers, encoders, norms."""
        return self.weight_bytes - sum(self.layer_bytes) - self.embedding_bytes - self.head_bytes

    @property
    def most_image_tokens(self) -> int:
        """What an image of a row becomes at the most."""
        return self.image_tokens or MOST_IMAGE_TOKENS

    @property
    def most_row_tokens(self) -> int | None:
        """The most tokens that a row can have with its answer: an encoder's source has a context beside the answer's own."""
        both = 2 if self.kind is GenericModelKind.SEQ2SEQ_LM else 1
        return None if self.max_context_tokens is None else both * self.max_context_tokens

    def kv_bytes(self, tokens: int, source_tokens: int = 0) -> int:
        """What a row of so many tokens keeps between two forward passes; `source_tokens` are those that an encoder read."""
        in_window = tokens if self.sliding_window is None else min(tokens, self.sliding_window)
        return (
            tokens * self.kv_bytes_per_token
            + in_window * self.sliding_kv_bytes_per_token
            + source_tokens * self.cross_kv_bytes_per_token
            + self.state_bytes_per_row
        )
