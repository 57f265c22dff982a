"""What does inspection learn of a model, from its configuration and its weight files' headers alone?"""

from dataclasses import dataclass
from pathlib import PurePosixPath

from ollm_service.core.plan import GenericModelKind, ModelModality, NativeFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """One model in one worker's models root.

    Sizes are in bytes, lengths in tokens. `digest` is the sha256 over weights, configuration, tokenizer and chat template: equal
    digests are equal models. `weight_bytes` is what the weights take in memory, in `dtype`. `refs` are the branches and tags that
    name `revision`, as far as the folder knows. `unsafe_because` says why the folder is refused; such a model is never planned.
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
    dtype: str | None = None
    weight_bytes: int = 0
    parameter_count: int = 0
    layer_count: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    vocabulary_size: int = 0
    attention_heads: int = 0
    kv_bytes_per_token: int = 0
    max_context_tokens: int | None = None
    has_chat_template: bool = False
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
