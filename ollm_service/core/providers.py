"""Which model families have specializations, which architectures belong to them, and which passes do they plan?"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ollm_service.core.plan import NativeFamily, PassId, ResolvedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecializationProvider:
    """One family's specializations. `pass_ids` are those that the engine has for it, in planned order."""

    provider_id: str
    family: NativeFamily
    architectures: frozenset[str]
    pass_ids: tuple[PassId, ...]

    def matches(self, resolved: ResolvedModel) -> bool:
        """Whether both the architecture and the family are this provider's."""
        return resolved.architecture in self.architectures and resolved.native_family is self.family


FAMILY_ARCHITECTURES: Mapping[NativeFamily, tuple[str, ...]] = MappingProxyType(
    {
        NativeFamily.LLAMA: ("LlamaForCausalLM",),
        NativeFamily.GEMMA3: ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        NativeFamily.GPT_OSS: ("GptOssForCausalLM", "OpenAIGptOssForCausalLM"),
        NativeFamily.QWEN3_NEXT: ("Qwen3NextForCausalLM", "Qwen3MoeForCausalLM"),
        NativeFamily.VOXTRAL: ("VoxtralForConditionalGeneration", "VoxtralForSpeechSeq2Seq"),
    }
)

PROVIDERS: tuple[SpecializationProvider, ...] = (
    SpecializationProvider(
        provider_id="llama-native",
        family=NativeFamily.LLAMA,
        architectures=frozenset(FAMILY_ARCHITECTURES[NativeFamily.LLAMA]),
        pass_ids=(PassId.DISK_CACHE, PassId.MLP_CHUNKING),
    ),
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
