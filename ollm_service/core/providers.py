"""Which model families have specializations, which models belong to them, and which passes do they plan?"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ollm_service.core.catalog import CATALOG
from ollm_service.core.options import RuntimeConfig
from ollm_service.core.plan import ModelModality, NativeFamily, PassId, ResolvedModel

# What inspection knows of a model beyond the fields of a resolved one; kept in its capabilities' details.
GDS_EXPORT_DETAIL, PROCESSOR_DETAIL, QUANTIZATION_DETAIL = "gds_export", "processor_files", "quantization"

FAMILY_ARCHITECTURES: Mapping[NativeFamily, tuple[str, ...]] = MappingProxyType(
    {
        NativeFamily.LLAMA: ("LlamaForCausalLM",),
        NativeFamily.GEMMA3: ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        NativeFamily.GPT_OSS: ("GptOssForCausalLM", "OpenAIGptOssForCausalLM"),
        NativeFamily.QWEN3_NEXT: ("Qwen3NextForCausalLM", "Qwen3MoeForCausalLM"),
        NativeFamily.VOXTRAL: ("VoxtralForConditionalGeneration", "VoxtralForSpeechSeq2Seq"),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecializationProvider:
    """One family's specializations. `needs_export`: it reads raw exported weights, and matches no model without them."""

    provider_id: str
    family: NativeFamily
    needs_export: bool = False

    def matches(self, resolved: ResolvedModel) -> bool:
        """Whether family and architecture are this provider's, and its export is there.

        Of a model of the catalog that no worker has yet only the family is known: it matches by that.
        """
        if resolved.native_family is not self.family:
            return False
        if resolved.digest is None and resolved.architecture is None:
            return True
        is_ours = resolved.architecture in FAMILY_ARCHITECTURES[self.family]
        return is_ours and (has_export(resolved) or not self.needs_export)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRule:
    """When a pass is planned: for a provider of these families, and on a condition, which `words` say."""

    pass_id: PassId
    families: frozenset[NativeFamily]
    words: str = ""
    holds: Callable[[ResolvedModel, RuntimeConfig], bool] = lambda _resolved, _config: True


def has_export(resolved: ResolvedModel) -> bool:
    """Whether raw exported weights are there that may be read; taken for granted of a model that nobody has yet."""
    return resolved.digest is None or resolved.capabilities.details.get(GDS_EXPORT_DETAIL) == "present"


def _may_page(resolved: ResolvedModel, config: RuntimeConfig) -> bool:
    entry = CATALOG.get(resolved.catalog_entry or "")
    return config.use_cache and (entry is None or entry.supports_disk_cache)


def _has_shell(resolved: ResolvedModel, config: RuntimeConfig) -> bool:
    return config.multimodal and bool({ModelModality.IMAGE, ModelModality.AUDIO} & set(resolved.capabilities.modalities))


_LLAMA, _GEMMA3, _GPT_OSS = NativeFamily.LLAMA, NativeFamily.GEMMA3, NativeFamily.GPT_OSS
_QWEN3_NEXT, _VOXTRAL = NativeFamily.QWEN3_NEXT, NativeFamily.VOXTRAL

# In the order in which passes are planned and applied.
PASS_RULES: tuple[PassRule, ...] = (
    PassRule(
        pass_id=PassId.DISK_CACHE,
        families=frozenset({_LLAMA, _GEMMA3, _QWEN3_NEXT, _VOXTRAL}),
        words="unless `use_cache` is false or the catalog says that the model does not support it",
        holds=_may_page,
    ),
    PassRule(pass_id=PassId.CPU_OFFLOAD, families=frozenset(NativeFamily)),
    PassRule(pass_id=PassId.GPU_OFFLOAD, families=frozenset({_QWEN3_NEXT})),
    PassRule(pass_id=PassId.MLP_CHUNKING, families=frozenset({_LLAMA, _GEMMA3, _VOXTRAL})),
    PassRule(pass_id=PassId.MOE_ROUTING, families=frozenset({_GPT_OSS, _QWEN3_NEXT})),
    PassRule(pass_id=PassId.ATTENTION_REPLACEMENT, families=frozenset({_GPT_OSS})),
    PassRule(
        pass_id=PassId.MULTIMODAL_SHELL,
        families=frozenset({_GEMMA3, _VOXTRAL}),
        words="with `multimodal`, for a model that takes images or sounds",
        holds=_has_shell,
    ),
    PassRule(
        pass_id=PassId.GDS_EXPORT_WEIGHTS,
        families=frozenset({_GPT_OSS}),
        words="with a sound `gds_export` folder",
        holds=lambda resolved, _config: has_export(resolved),
    ),
)

PROVIDERS: tuple[SpecializationProvider, ...] = (
    SpecializationProvider(provider_id="llama-native", family=_LLAMA),
    SpecializationProvider(provider_id="gemma3-native", family=_GEMMA3),
    SpecializationProvider(provider_id="qwen3-next-native", family=_QWEN3_NEXT),
    SpecializationProvider(provider_id="gpt-oss-native", family=_GPT_OSS, needs_export=True),
    SpecializationProvider(provider_id="voxtral-native", family=_VOXTRAL),
)


def family_of(architecture: str | None) -> NativeFamily | None:
    """The family that an architecture belongs to, if any."""
    for family, architectures in FAMILY_ARCHITECTURES.items():
        if architecture in architectures:
            return family
    return None


def matching_providers(
    resolved: ResolvedModel, providers: Iterable[SpecializationProvider] = PROVIDERS
) -> tuple[SpecializationProvider, ...]:
    """Every provider that matches, in declaration order; more than one is ambiguous, which planning refuses."""
    return tuple(provider for provider in providers if provider.matches(resolved))


def planned_passes(resolved: ResolvedModel, config: RuntimeConfig, provider: SpecializationProvider) -> tuple[PassId, ...]:
    """The passes that a matching provider plans for the model with these options, in order, each once."""
    return tuple(
        dict.fromkeys(rule.pass_id for rule in PASS_RULES if provider.family in rule.families and rule.holds(resolved, config))
    )
