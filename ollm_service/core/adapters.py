"""Which adapters may be put on a model? Judged by what their configuration says; hostile input.

Offered are those that add small matrices to a model's own layers. Not offered are those that read other files, import modules
that the configuration names, change the number of layers, or feed the model something besides the row's tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ollm_service.core.errors import shown

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_TYPES = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA")
# Each asks for more than the adapter's own weights: files that are unpickled, modules, other layers, or marks in the prompt.
_REFUSED_SETTINGS = (
    *("megatron_config", "layer_replication", "alora_invocation_tokens", "corda_config", "eva_config", "loftq_config"),
    *("lora_ga_config", "arrow_config", "monteclora_config"),
)
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """An adapter on one host: its folder, absolute, and the sha256 over its configuration and weights."""

    folder: str
    digest: str


def adapter_problem(config: Mapping[str, Any]) -> str | None:
    """Why an adapter with this adapter_config.json cannot be used; None where it can."""
    kind = config.get("peft_type")
    if kind not in ADAPTER_TYPES:
        return f"its peft_type is {shown(kind)}; offered are {', '.join(ADAPTER_TYPES)}"
    asked = [name for name in _REFUSED_SETTINGS if config.get(name)]
    if asked:
        return f"its {ADAPTER_CONFIG} sets {asked[0]}, which is not offered; merge the adapter into its model instead"
    start = config.get("init_lora_weights", True)
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        return f"its init_lora_weights is {shown(start)}, which changes the model's own weights; convert it to a plain LoRA"
    return None
