"""quantized-cold-tier: how does a paged KV cache take a half or a quarter of the disk and of the reading?

Pages hold int8, symmetric, with a scale for each token and head: the largest magnitude of its D numbers / 127. The tail in
memory stays in full precision, and the prompt's own forward pass sees its keys and values as they were computed.

Tolerance: a number x that was written comes back as y with |x - y| <= scale / 2, that is 1/254 of the largest magnitude of its
token and head, and the rounding of its own dtype on top. A scale takes in nothing but one token of one row, so what comes
back does not depend on the other rows, or on where pages begin. Of the logits that follow nothing
can be said for every model. `tests/runner/test_kv_quantized.py` holds those of small ones of six families with random weights:
errors of 2 % of the logits' standard deviation, as the root of the mean square, and of 25 % at most. With a scale for
each page instead of each token they were twice as large.

What is no number, or too large, cannot be quantized: then the whole token of that row and head comes back as not a number. So the
row's next logits are none, and it fails with that reason; the other rows are not touched.

H key heads, N tokens, D head width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_LARGEST = 127


class Int8:
    """Scales, then integers."""

    format = "ollm-kv-quantized"

    def encode(self, states_HND: Tensor) -> tuple[Tensor, ...]:
        """Scales [H, N, 1] and int8 [H, N, D]."""
        return quantize(states_HND)

    def decode(self, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """States [H, N, D]."""
        scales_HN1, integers_HND = parts
        return dequantize(scales_HN1, integers_HND, dtype)


def quantize(states_HND: Tensor) -> tuple[Tensor, Tensor]:
    """Scales [H, N, 1] and integers [H, N, D] in -127..127. Where a number is not finite the scale is not a number."""
    wide_HND = states_HND.to(torch.promote_types(states_HND.dtype, torch.float32))
    largest_HN1 = wide_HND.abs().amax(dim=-1, keepdim=True)
    # Below the smallest normal number division loses its precision; there everything is 0 within the tolerance of that scale.
    scales_HN1 = (largest_HN1 / _LARGEST).clamp(min=torch.finfo(wide_HND.dtype).tiny)
    integers_HND = (wide_HND / scales_HN1).round_().nan_to_num_(0.0).clamp_(-_LARGEST, _LARGEST).to(torch.int8)
    return scales_HN1.masked_fill_(~largest_HN1.isfinite(), torch.nan), integers_HND


def dequantize(scales_HN1: Tensor, integers_HND: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers times scales. Rounding never makes a number infinite; what is not a number stays so."""
    largest = torch.finfo(dtype).max
    return (integers_HND * scales_HN1).clamp_(-largest, largest).to(dtype)
