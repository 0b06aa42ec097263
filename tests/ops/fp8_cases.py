"""Weights that a quantizer must get right, and a comparison of bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_fp32.ops.fp8 import Quantized
from megatron_fp32.ops.fp8.reference import e4m3_values, quantize_reference
from megatron_fp32.ops.fp8.scales import ScaleFormat

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FORMATS: tuple[ScaleFormat, ...] = ("fp32", "bf16", "ue8m0")
SHAPES = ((1, 1), (128, 128), (129, 127), (5, 300), (260, 64), (256, 384))


def random_weight(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Blocks and rows of different magnitudes, a block of zeros among them where there are several."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    weight *= torch.rand(*shape[:-1], 1, generator=generator).mul_(8).exp2_() * 2.0**-10
    weight[..., 128:256, :128] = 0
    return weight.to(dtype)


def ties(dtype: torch.dtype) -> Tensor:
    """[3, n]: with 448 in its row, so that the scale is 1: every e4m3 value, every middle of two, and their neighbours.

    The middles of e4m3's denormals are among them, and half of the smallest one, which is a tie with 0.
    """
    values = e4m3_values()
    middles = ((values[1:] + values[:-1]) / 2).to(dtype)
    towards = [torch.full_like(middles, end) for end in (0, 1000)]
    near = [torch.nextafter(middles, end) for end in towards]
    magnitudes = torch.cat([values.to(dtype), middles, *near])
    magnitudes = magnitudes[magnitudes <= 448]
    return torch.stack([magnitudes, -magnitudes, magnitudes.flip(0)])


def extremes(dtype: torch.dtype) -> Tensor:
    """[n, 4]: rows whose scale would be denormal, whose weights are, that reach the largest number; signed zeros."""
    info = torch.finfo(dtype)
    denormal = info.smallest_normal / 4
    rows = [
        [info.max, -info.max, info.smallest_normal, -denormal],
        [denormal, -denormal, denormal / 2, 0.0],
        [info.smallest_normal, -denormal, -0.0, 0.0],
        [info.smallest_normal * 448, info.smallest_normal, denormal, -info.smallest_normal * 3],
        [-0.0, 0.0, -0.0, 0.0],
        [1.0, -0.0, 2.0**-10, -(2.0**-19)],
    ]
    return torch.tensor(rows, dtype=torch.float64).to(dtype)


def assert_is_reference(got: Quantized, weight: Tensor, block: tuple[int, int], **options: Any) -> None:
    """Codes and scales, bit for bit."""
    codes, scales = quantize_reference(weight.cpu(), block, **options)
    assert got.weight.dtype == torch.float8_e4m3fn
    assert got.weight.shape == weight.shape
    assert tuple(got.scale.shape) == tuple(scales.shape)
    assert torch.equal(got.scale.cpu().double(), scales)
    different = (got.weight.cpu().view(torch.uint8) != codes).nonzero()
    assert not len(different), f"{len(different)} codes differ, the first at {different[0].tolist()}"


def assert_same_bits(got: Quantized, expected: Quantized) -> None:
    """Of two quantizations, on whatever devices."""
    assert got.scale.dtype == expected.scale.dtype
    assert torch.equal(got.scale.cpu(), expected.scale.cpu())
    assert torch.equal(got.weight.cpu().view(torch.uint8), expected.weight.cpu().view(torch.uint8))
