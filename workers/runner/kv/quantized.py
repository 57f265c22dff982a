"""quantized-cold-tier: how does a paged KV cache take a half or a quarter of the disk and of the reading?

Pages hold int8, symmetric, with a scale for each row, head and token: the largest magnitude of its D numbers / 127. The tail in
memory stays in full precision, and the prompt's own forward pass sees its keys and values as they were computed.

Tolerance: a number x that was written comes back as y with |x - y| <= scale / 2, that is 1/254 of the largest magnitude of its
row, head and token, and the rounding of its own dtype on top. A scale takes in nothing but one token of one row, so what comes
back does not depend on the other rows of a micro-batch, on padding, or on where pages begin. Of the logits that follow nothing
can be said for every model. `tests/runner/test_kv_quantized.py` holds those of small ones of six families with random weights:
errors of 2 % of the logits' standard deviation, as the root of the mean square, and of 25 % at most. With a scale for
each page instead of each token they were twice as large.

What is no number, or too large, cannot be quantized: then the whole token of that row and head comes back as not a number. So the
row's next logits are none, and it fails with that reason; the other rows are not touched.

B rows, H key heads, N tokens, D head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ollm_service.core.estimates import weight_element_bytes
from ollm_service.core.profile import ModelProfile
from workers.runner.kv.paged import Paged
from workers.runner.kv.traffic import Traffic

_LARGEST = 127


class Int8:
    """Scales, then integers."""

    format = "ollm-kv-quantized"

    def encode(self, states_BHND: Tensor) -> tuple[Tensor, ...]:
        """Scales [B, H, N, 1] and int8 [B, H, N, D]."""
        return quantize(states_BHND)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """States [B, H, N, D]."""
        scales_BHN1, integers_BHND = parts
        return dequantize(scales_BHN1, integers_BHND, dtype)


class QuantizedColdTier(Paged):
    """The strategy."""

    encoding = Int8()

    def most_file_bytes(self, profile: ModelProfile, rows: int, tokens: int) -> int:
        """A byte for each element, and a scale for as many of them as a head is wide."""
        elements = profile.kv_bytes_per_token // weight_element_bytes(profile)
        heads = max(1, profile.attention_heads)
        scales = -(-elements // max(1, profile.attention_width // heads)) * torch.float32.itemsize
        return rows * tokens * (elements + scales)

    def evidence(self, traffic: Traffic) -> str:
        """Bytes and pages, and the bytes that these were before."""
        return f"{super().evidence(traffic)} of int8, for {traffic.bytes_before_encoding:,} bytes of keys and values"


def quantize(states_BHND: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [B, H, N, 1] and integers [B, H, N, D] in -127..127. Where a number is not finite the scale is not a number."""
    wide_BHND = states_BHND.to(torch.promote_types(states_BHND.dtype, torch.float32))
    largest_BHN1 = wide_BHND.abs().amax(dim=-1, keepdim=True)
    # Below the smallest normal number division loses its precision; there everything is 0 within the tolerance of that scale.
    scales_BHN1 = (largest_BHN1 / _LARGEST).clamp(min=torch.finfo(wide_BHND.dtype).tiny)
    integers_BHND = (wide_BHND / scales_BHN1).round_().nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return scales_BHN1.masked_fill_(~largest_BHN1.isfinite(), torch.nan), integers_BHND


def dequantize(scales_BHN1: Tensor, integers_BHND: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers times scales. Rounding never makes a number infinite; what is not a number stays so."""
    largest = torch.finfo(dtype).max
    return (integers_BHND * scales_BHN1).clamp_(-largest, largest).to(dtype)
