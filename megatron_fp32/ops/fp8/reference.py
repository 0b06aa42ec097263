"""What the quantizers must return, from the definition of the number formats, in float64 and one block at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_fp32.ops.fp8.scales import ScaleFormat


def e4m3_values() -> Tensor:
    """[127] float64, the value of every code from 0x00 to 0x7E (OCP 8-bit floating point specification, table 1).

    Four bits of exponent with a bias of 7, three of mantissa; 0x7F is NaN and there is no infinity.
    """
    values = []
    for code in range(0x7F):
        exponent, mantissa = code >> 3, code & 7
        values.append(mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    return torch.tensor(values, dtype=torch.float64)


def e4m3_reference(values: Tensor) -> Tensor:
    """Codes, uint8, of the nearest values; ties go to the even code, and what is too large to the largest."""
    table = e4m3_values()
    magnitude = values.double().abs()
    above = torch.searchsorted(table, magnitude).clamp(max=len(table) - 1)
    below = (above - 1).clamp(min=0)
    to_above, to_below = table[above] - magnitude, magnitude - table[below]
    up = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    codes = torch.where(up, above, below)
    negative = torch.signbit(values)
    return (codes + 0x80 * negative).to(torch.uint8)


def scale_reference(amax: float, scale_format: ScaleFormat = "fp32", zero_scale: float = 1.0) -> float:
    """The scale of a block, as in `scales`. A float64 quotient of two float32 rounds to the float32 quotient."""
    scale = zero_scale if amax == 0 else max(_rounded(amax / 448.0, torch.float32), 2.0**-126)
    if scale_format == "bf16":
        return _rounded(scale, torch.bfloat16)
    if scale_format == "ue8m0":
        fraction, exponent = math.frexp(scale)
        return 2.0 ** (exponent - 1 if fraction == 0.5 else exponent)
    return scale


def quantize_reference(
    weight: Tensor, block: tuple[int, int], *, scale_format: ScaleFormat = "fp32", zero_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The codes [N, K] uint8, and the scales [ceil(N / block[0]), ceil(K / block[1])] float64, of a finite weight."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]), dtype=torch.float64)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            values = weight[here].double()
            scale = scale_reference(float(values.abs().max()), scale_format, zero_scale)
            # Exact in float64, so that `.float()` is the only rounding.
            products = values * _rounded(1.0 / scale, torch.float32)
            codes[here] = e4m3_reference(products.float())
            scales[i, j] = scale
    return codes, scales


def dequantize_reference(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """[N, K] float64, without any rounding."""
    table = torch.cat([e4m3_values(), torch.tensor([torch.nan], dtype=torch.float64)])
    values = torch.cat([table, -table])[codes.long()]
    rows, columns = codes.shape
    spread = scales.double().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return values * spread


def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=torch.float64).to(dtype))
