"""The scale of a block: what a float8 value is multiplied by.

For a block with the largest magnitude `amax`, in float32 with one rounding an operation:

    scale   = max(amax / 448, 2^-126)        rounded to its format; `zero_scale` where amax is 0
    inverse = 1 / scale
    q       = e4m3(w * inverse)              to nearest, ties to even

Both divisions are IEEE divisions, and there are two of them a block; a weight costs one multiplication. Against
dividing every weight that moves `w * inverse` by at most 1.5 units in the last of 24 bits, before it is rounded to 4
bits, and it is what vLLM (`per_block_cast_to_fp8`) and transformers (`Fp8Quantize`) do. |w * inverse| never exceeds
448 * (1 + 2^-8), even with the scale rounded to bfloat16, and e4m3 rounds all below 464 to 448 or less: nothing needs
to be clamped, and nothing becomes NaN. Below 2^-126 a scale would be denormal, and its inverse could be infinite.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126
"""The smallest normal float32."""

ScaleFormat = Literal["fp32", "bf16", "ue8m0"]
"""What scales are rounded to: "bf16" to nearest, as in Qwen's releases; "ue8m0" up to a power of two, as DeepGEMM
wants them on Blackwell (`scale_fmt` of DeepSeek-V3.1)."""

SCALE_FORMATS: tuple[ScaleFormat, ...] = get_args(ScaleFormat)


def scale_dtype(scale_format: ScaleFormat) -> torch.dtype:
    """What scales of this format are returned as; powers of two are float32."""
    return torch.bfloat16 if scale_format == "bf16" else torch.float32


def scales_of(amax: Tensor, scale_format: ScaleFormat, zero_scale: float) -> Tensor:
    """The scales of blocks, float32; NaN where `amax`, float32, is infinite or NaN."""
    # By a tensor: CUDA multiplies by the reciprocal of a number.
    scale = (amax / amax.new_full((), E4M3_MAX)).clamp(min=SMALLEST_SCALE)
    scale = torch.where(amax == 0, zero_scale, scale)
    if scale_format == "bf16":
        scale = scale.bfloat16().float()
    elif scale_format == "ue8m0":
        scale = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)
