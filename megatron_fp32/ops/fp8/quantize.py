"""Weights as float8_e4m3fn with scales, and back; the arithmetic is stated in `scales`.

One pass over memory: on the CPU a slab at a time through a buffer that fits the cache, on a GPU by Triton kernels
(`kernels`). Both return the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp32.ops.fp8.quantize_torch import Block, quantize_torch
from megatron_fp32.ops.fp8.scales import SCALE_FORMATS, ScaleFormat, scale_dtype


class Quantized(NamedTuple):
    """`weight * scale`, the scale spread over its block, is what was quantized."""

    weight: Tensor
    """float8_e4m3fn."""
    scale: Tensor
    """float32 or bfloat16."""


@torch.no_grad()
def quantize_blockwise(
    weight: Tensor,
    block: Block = (128, 128),
    *,
    scale_format: ScaleFormat = "fp32",
    zero_scale: float = 1.0,
    check: bool = True,
) -> Quantized:
    """Quantize a weight with a scale for each block.

    Args:
        weight: [N, K] or [experts, N, K], bfloat16, float16 or float32, of any strides; each expert is quantized on
            its own.
        block: rows and columns of a block; those at the end may be smaller.
        scale_format: what scales are rounded to, before the weights are divided by them.
        zero_scale: the scale of a block of zeros.
        check: raise for infinite and NaN weights now, which on a GPU waits for the device. Otherwise their blocks have
            the scale NaN, for `check_quantized` to find.

    Returns:
        float8_e4m3fn of the weight's shape, and [..., ceil(N / block[0]), ceil(K / block[1])] scales, bfloat16 for
        that format and else float32. Scales are what DeepSeek's files call `weight_scale_inv`: they multiply.

    Raises:
        TypeError: for another dtype.
        ValueError: for another number of dimensions, and for infinite or NaN weights, with the place of the first.
    """
    _check_arguments(weight, block, scale_format)
    grid = (-(-weight.shape[-2] // block[0]), -(-weight.shape[-1] // block[1]))
    return _quantize(weight, block, grid, scale_format, zero_scale, check)


@torch.no_grad()
def quantize_channelwise(
    weight: Tensor, *, scale_format: ScaleFormat = "fp32", zero_scale: float = 1.0, check: bool = True
) -> Quantized:
    """Quantize a weight with a scale for each output channel.

    Args:
        weight: [N, K] or [experts, N, K], as in `quantize_blockwise`.
        scale_format: as there.
        zero_scale: the scale of a row of zeros.
        check: as there.

    Returns:
        float8_e4m3fn of the weight's shape, and [..., N, 1] scales.

    Raises:
        TypeError: as `quantize_blockwise`.
        ValueError: as `quantize_blockwise`.
    """
    _check_arguments(weight, (1, 1), scale_format)
    block = (1, max(weight.shape[-1], 1))
    return _quantize(weight, block, (weight.shape[-2], 1), scale_format, zero_scale, check)


def dequantize_blockwise(
    weight: Tensor, scale: Tensor, block: Block = (128, 128), *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The weights [..., N, K] of `quantize_blockwise`: the product in float32, rounded to `dtype` once.

    Raises:
        ValueError: when the shape of `scale` does not fit the blocks.
    """
    rows, columns = weight.shape[-2:]
    expected = (*weight.shape[:-2], -(-rows // block[0]), -(-columns // block[1]))
    if tuple(scale.shape) != expected:
        raise ValueError(f"scales of a weight {tuple(weight.shape)} must be {expected}, got {tuple(scale.shape)}")
    out = torch.empty_like(weight, dtype=dtype)
    spread = scale.float().repeat_interleave(block[1], -1)[..., :columns]
    for index in range(expected[-2]):
        here = slice(index * block[0], (index + 1) * block[0])
        out[..., here, :] = weight[..., here, :].float() * spread[..., index : index + 1, :]
    return out


def dequantize_channelwise(weight: Tensor, scale: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights [..., N, K] of `quantize_channelwise`: the product in float32, rounded to `dtype` once.

    Raises:
        ValueError: when the scales are not [..., N, 1].
    """
    expected = (*weight.shape[:-1], 1)
    if tuple(scale.shape) != expected:
        raise ValueError(f"scales of a weight {tuple(weight.shape)} must be {expected}, got {tuple(scale.shape)}")
    return (weight.float() * scale.float()).to(dtype)


def check_quantized(scales: Mapping[str, Tensor]) -> None:
    """Find the weights that were not finite, among many that were quantized with `check=False`; waits once a device.

    Args:
        scales: by the names of their weights.

    Raises:
        ValueError: with the names.
    """
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for name, scale in scales.items():
        flags.setdefault(scale.device, {})[name] = scale.isnan().any()
    bad = [
        name
        for found in flags.values()
        for name, flag in zip(found, torch.stack(list(found.values())).tolist(), strict=True)
        if flag
    ]
    if bad:
        raise ValueError(f"infinite or NaN weights cannot be quantized: {', '.join(sorted(bad))}")


def _check_arguments(weight: Tensor, block: Block, scale_format: str) -> None:
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"a weight to quantize must be bfloat16, float16 or float32, got {weight.dtype}")
    if weight.ndim not in (2, 3):
        raise ValueError(f"a weight to quantize must be [N, K] or [experts, N, K], got {tuple(weight.shape)}")
    if len(block) != 2 or min(block) < 1:
        raise ValueError(f"a block must have one or more rows and columns, got {block}")
    if scale_format not in SCALE_FORMATS:
        raise ValueError(f"the format of scales must be one of {SCALE_FORMATS}, got {scale_format!r}")


def _quantize(
    weight: Tensor, block: Block, grid: tuple[int, int], scale_format: ScaleFormat, zero_scale: float, check: bool
) -> Quantized:
    experts = weight if weight.ndim == 3 else weight[None]
    out = torch.empty(experts.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty((len(experts), *grid), dtype=torch.float32, device=weight.device)
    if weight.numel() == 0:
        scale.fill_(zero_scale)
    elif weight.is_cuda:
        from megatron_fp32.ops.fp8.kernels import quantize_triton

        with torch.cuda.device(weight.device):
            quantize_triton(experts, out, scale, block, scale_format, zero_scale)
    else:
        for expert in range(len(experts)):
            quantize_torch(experts[expert], out[expert], scale[expert], block, scale_format, zero_scale)
    if check:
        _raise_for_first(experts, scale, block, with_expert=weight.ndim == 3)
    scale = scale.to(scale_dtype(scale_format))
    return Quantized(out.view(weight.shape), scale if weight.ndim == 3 else scale[0])


def _raise_for_first(experts: Tensor, scale: Tensor, block: Block, *, with_expert: bool) -> None:
    bad = scale.isnan()
    if not bad.any():
        return
    expert, i, j = bad.nonzero()[0].tolist()
    row, column = i * block[0], j * block[1]
    values = experts[expert, row : row + block[0], column : column + block[1]]
    r, c = (~values.isfinite()).nonzero()[0].tolist()
    place = [expert] * with_expert + [row + r, column + c]
    raise ValueError(f"infinite or NaN weights cannot be quantized: weight{place} is {float(values[r, c])}")
