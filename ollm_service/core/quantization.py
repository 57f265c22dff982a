"""In which ways may a checkpoint's weights be quantized, what does a worker need for each, and what do they weigh when loaded?"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# Unpacked with transformers alone, by every worker.
MXFP4 = "mxfp4"
COMPRESSED_TENSORS, GPTQ, AWQ, BITSANDBYTES = "compressed-tensors", "gptq", "awq", "bitsandbytes"
# The packages that transformers loads each with, by the names under which they are installed.
QUANTIZATION_LIBRARIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        COMPRESSED_TENSORS: ("compressed-tensors",),
        GPTQ: ("gptqmodel", "optimum"),
        AWQ: ("gptqmodel",),
        BITSANDBYTES: ("bitsandbytes",),
    }
)
LOADED_QUANTIZATIONS = (MXFP4, *QUANTIZATION_LIBRARIES)
_MOST_BITS = 32
# Ends of the names of what goes with packed weights, and is gone once they are plain.
_ASIDE = ("_scale", "_shape", "_zero_point", "_g_idx", "_global_scale")


def quantization_of(scheme: Mapping[str, Any]) -> str | None:
    """The method that a `quantization_config` names; files of bitsandbytes may name none."""
    method = scheme.get("quant_method")
    if isinstance(method, str):
        return method
    return BITSANDBYTES if scheme.get("load_in_4bit") is True or scheme.get("load_in_8bit") is True else None


def is_unpacked(method: str | None) -> bool:
    """Whether the runner makes plain weights of packed ones as it loads them."""
    return method in (MXFP4, COMPRESSED_TENSORS)


def stays_packed(method: str | None) -> bool:
    """Whether its library computes with the packed weights themselves."""
    return method in QUANTIZATION_LIBRARIES and not is_unpacked(method)


def fewest_bits(scheme: Mapping[str, Any]) -> int:
    """Bits of a packed weight by compressed-tensors; the fewest of all groups, 4 where none says."""
    groups = scheme.get("config_groups")
    found: list[int] = []
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        if isinstance(bits, int) and not isinstance(bits, bool) and 1 <= bits <= _MOST_BITS:
            found.append(bits)
    return min(found, default=4)


def is_gone_when_plain(name: str) -> bool:
    """Whether a tensor of compressed-tensors says how to unpack another one, and is no weight itself."""
    return name.rpartition(".")[2].startswith(("weight_", "input_", "output_", "k_", "v_", "q_")) and name.endswith(_ASIDE)
