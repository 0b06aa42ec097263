"""The definition of the quantizer in torch operators.

It runs on the CPU, a slab at a time, through a buffer that fits the cache.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from megatron_fp32.ops.fp8.scales import ScaleFormat, scales_of

SLAB = 1 << 18
"""float32 values in each of the two buffers of the CPU's path, unless a single block has more."""

Block = tuple[int, int]


def quantize_torch(
    weight: Tensor, out: Tensor, scale: Tensor, block: Block, scale_format: ScaleFormat, zero_scale: float
) -> None:
    """The definition, in torch operators: [N, K] into `out`, float8_e4m3fn, and `scale`, float32."""
    (rows, columns), (height, width) = weight.shape, block
    slab_columns = min(width * max(1, SLAB // (height * width)), -(-columns // width) * width)
    slab_rows = min(height * max(1, SLAB // (height * slab_columns)), -(-rows // height) * height)
    values, magnitudes = weight.new_empty(2, slab_rows * slab_columns, dtype=torch.float32)
    for row, column in itertools.product(range(0, rows, slab_rows), range(0, columns, slab_columns)):
        part = weight[row : row + slab_rows, column : column + slab_columns]
        blocks = (-(-part.shape[0] // height), -(-part.shape[1] // width))
        padded = (blocks[0] * height, blocks[1] * width)
        slab = values[: padded[0] * padded[1]].view(padded)
        if padded != part.shape:
            slab.zero_()
        slab[: part.shape[0], : part.shape[1]] = part
        tiles = slab.view(blocks[0], height, blocks[1], width)
        amax = torch.abs(tiles, out=magnitudes[: slab.numel()].view(tiles.shape)).amax((1, 3))
        found = scales_of(amax, scale_format, zero_scale)
        tiles *= found.reciprocal()[:, None, :, None]
        out[row : row + slab_rows, column : column + slab_columns] = slab[: part.shape[0], : part.shape[1]]
        scale[row // height :, column // width :][: blocks[0], : blocks[1]] = found
