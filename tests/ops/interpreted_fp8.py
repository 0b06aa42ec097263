"""Run in Triton's interpreter: the quantizing kernels against their definition in torch, bit for bit.

The interpreter truncates where the hardware's conversion to e4m3 rounds, so what runs here is the kernels' own
conversion; tests/gpu compares both on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_fp32.ops.fp8 import Quantized, kernels
from megatron_fp32.ops.fp8.quantize_torch import quantize_torch
from megatron_fp32.ops.fp8.scales import ScaleFormat
from tests.ops.fp8_cases import DTYPES, FORMATS, assert_same_bits, extremes, random_weight, ties


def compare(weight: Tensor, block: tuple[int, int], *options: Any) -> None:
    """Both write over NaN; the kernel must not write beyond its room."""
    experts = weight if weight.ndim == 3 else weight[None]
    e, n, k = experts.shape
    shape = (e, -(-n // block[0]), -(-k // block[1]))
    results = []
    for path in ("torch", "triton"):
        room = torch.full((e * n * k + 7,), 0x7F, dtype=torch.uint8)
        scale_room = torch.full((shape[0] * shape[1] * shape[2] + 7,), torch.nan)
        out = room[:-7].view(torch.float8_e4m3fn).view(e, n, k)
        scale = scale_room[:-7].view(shape)
        if path == "triton":
            kernels.quantize_triton(experts, out, scale, block, *options, native=False)
        else:
            for i in range(e):
                quantize_torch(experts[i], out[i], scale[i], block, *options)
        assert (room[-7:] == 0x7F).all()
        assert scale_room[-7:].isnan().all()
        results.append(Quantized(out, scale))
    assert_same_bits(results[1], results[0])


def ties_and_extremes(dtype: torch.dtype, scale_format: ScaleFormat) -> None:
    for make in (ties, extremes):
        weight = make(dtype)
        compare(weight, (1, weight.shape[1]), scale_format, 0.5)
        compare(weight, (2, 96), scale_format, 1.0)


def views(dtype: torch.dtype) -> None:
    weight = random_weight(2, 140, 260, dtype=dtype)
    for view in (weight, weight[:, 3:, 5:], weight.transpose(1, 2), weight[1:, ::2]):
        for block in ((128, 128), (48, 96), (1, view.shape[2])):
            compare(view, block, "fp32", 1.0)


def long_rows() -> None:
    with mock.patch.multiple(kernels, LONGEST_ROW=64, _LONG_CHUNK=128):
        compare(random_weight(2, 5, 300, dtype=torch.bfloat16), (1, 300), "bf16", 1.0)


def blocks_beyond_the_largest_tile() -> None:
    with mock.patch.object(kernels, "LARGEST_TILE", 64):
        compare(random_weight(2, 20, 30, dtype=torch.bfloat16), (16, 16), "fp32", 1.0)


def infinity_and_nan(columns: int) -> None:
    """Short rows, and with a `LONGEST_ROW` of 32 long ones."""
    bad = random_weight(3, columns, dtype=torch.float32)
    bad[0, 3], bad[2, columns - 1] = torch.inf, torch.nan
    out, scale = torch.empty(1, 3, columns, dtype=torch.float8_e4m3fn), torch.empty(1, 3, 1)
    with mock.patch.multiple(kernels, LONGEST_ROW=32, _LONG_CHUNK=128):
        kernels.quantize_triton(bad[None], out, scale, (1, columns), "ue8m0", 1.0, native=False)
    assert scale.isnan().flatten().tolist() == [True, False, True]


CASES: dict[str, Callable[[], None]] = {
    **{
        f"ties and extremes, {dtype}, {scale_format}": functools.partial(ties_and_extremes, dtype, scale_format)
        for dtype in DTYPES
        for scale_format in FORMATS
    },
    **{f"views, {dtype}": functools.partial(views, dtype) for dtype in DTYPES},
    "long rows": long_rows,
    "blocks beyond the largest tile": blocks_beyond_the_largest_tile,
    **{f"infinity and NaN, {columns} columns": functools.partial(infinity_and_nan, columns) for columns in (32, 40)},
}
