"""What is one tensor of a safetensors file, and how large is it in memory?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

BITS: Mapping[str, int] = MappingProxyType(
    {
        "F4": 4,
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
        **dict.fromkeys(("U32", "I32", "F32"), 32),
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    }
)
# The element types that a model's own can be; they are cast to that when it is loaded, and so are floats of one byte.
FLOATS: Mapping[str, str] = MappingProxyType({"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"})
ELEMENT_BYTES: Mapping[str, int] = MappingProxyType({"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2})


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor as a safetensors header declares it; its bytes have been checked to lie in the file, `span` in its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int] = field(default=(0, 0), compare=False)

    @property
    def element_count(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def is_plain_matrix(self) -> bool:
        """Whether its shape is that of a linear map, as it is not for packed weights."""
        return len(self.shape) == 2 and (self.dtype in FLOATS or self.dtype.startswith("F8"))

    def loaded_bytes(self, dtype: str | None) -> int:
        """Its size in memory: floating-point weights are cast to the model's dtype, whole numbers and packed ones stay."""
        is_float = self.dtype in FLOATS or self.dtype.startswith("F8")
        cast = ELEMENT_BYTES.get(dtype or "") if is_float else None
        bits = 8 * cast if cast else BITS[self.dtype]
        return -(-self.element_count * bits // 8)
