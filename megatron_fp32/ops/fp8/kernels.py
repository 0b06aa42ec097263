"""The quantizers in one pass over a GPU's memory, bit-equal to `quantize_torch`.

A program holds its block in registers while it takes the largest magnitude, so that each weight is read once. Rows of
more than `LONGEST_ROW` are read twice, the second time from the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fp32.ops.fp8.quantize import quantize_torch
from megatron_fp32.ops.fp8.scales import E4M3_MAX, SMALLEST_SCALE, ScaleFormat

LONGEST_ROW = 16384
LARGEST_TILE = 1 << 15
BLOCK_VALUES_A_THREAD, ROW_VALUES_A_THREAD = 64, 32
_ROW_TILE, _LONG_CHUNK = 4096, 8192
_LARGEST_GRID = 65535
"""In any but the first dimension."""

_E4M3_MAX: tl.constexpr = tl.constexpr(E4M3_MAX)
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _load(pointers, mask, BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32; bfloat16 comes as int16, whose bits are the upper half of a float32."""
    values = tl.load(pointers, mask=mask, other=0)
    if BF16:
        return (values.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return values.to(tl.float32)


@triton.jit
def _magnitude_bits(values):  # type: ignore[no-untyped-def]
    """In the order of the magnitudes, as int32: infinity is above every number, and NaN above infinity."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(amax_bits, zero_scale, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `scales_of`. Triton's `/` is no IEEE division, `div_rn` is."""
    scale = tl.maximum(tl.div_rn(amax_bits.to(tl.float32, bitcast=True), _E4M3_MAX), _SMALLEST_SCALE)
    scale = tl.where(amax_bits == 0, zero_scale, scale)
    bits = scale.to(tl.int32, bitcast=True)
    if FORMAT == "bf16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    if FORMAT == "ue8m0":
        bits = (bits + 0x7FFFFF) & 0x7F800000
    return tl.where(amax_bits < 0x7F800000, bits.to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def _e4m3(values, NATIVE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes, uint8, of values below 464 in magnitude."""
    if NATIVE:
        return values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = values.to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Rounds to 3 bits of mantissa; the exponent's bias goes from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # The last bit of a float32 at 2^14 is 2^-9, the smallest e4m3: the sum rounds to it.
        sums = magnitude.to(tl.float32, bitcast=True) + 16384.0
        denormal = sums.to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < (121 << 23), denormal, normal)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _block_kernel(  # type: ignore[no-untyped-def]
    weight, out, scale, rows, columns, expert_stride, row_stride, zero_scale,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    BF16: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A program a block; neighbours in a row run together."""
    row = tl.program_id(1) * HEIGHT + tl.arange(0, TILE_ROWS)
    column = tl.program_id(0) * WIDTH + tl.arange(0, TILE_COLUMNS)
    expert = tl.program_id(2).to(tl.int64)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    if TILE_ROWS != HEIGHT:
        inside = inside & (tl.arange(0, TILE_ROWS) < HEIGHT)[:, None]
    if TILE_COLUMNS != WIDTH:
        inside = inside & (tl.arange(0, TILE_COLUMNS) < WIDTH)[None, :]
    wide_row = row.to(tl.int64)[:, None]
    values = _load(weight + expert * expert_stride + wide_row * row_stride + column[None, :], inside, BF16)
    block_scale = _scale(tl.max(tl.max(_magnitude_bits(values), 1), 0), zero_scale, FORMAT)
    codes = _e4m3(values * tl.div_rn(1.0, block_scale), NATIVE)
    tl.store(out + (expert * rows + wide_row) * columns + column[None, :], codes, mask=inside)
    block = (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scale + block, block_scale)


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    weight, out, scale, rows, columns, expert_stride, row_stride, zero_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BF16: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A program for so many rows as make a tile."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < columns)
    wide_row = row.to(tl.int64)
    values = _load(weight + expert * expert_stride + wide_row[:, None] * row_stride + column, inside, BF16)
    row_scale = _scale(tl.max(_magnitude_bits(values), 1), zero_scale, FORMAT)
    codes = _e4m3(values * tl.div_rn(1.0, row_scale)[:, None], NATIVE)
    tl.store(out + (expert * rows + wide_row)[:, None] * columns + column, codes, mask=inside)
    tl.store(scale + expert * rows + wide_row, row_scale, mask=row < rows)


@triton.jit
def _long_row_kernel(  # type: ignore[no-untyped-def]
    weight, out, scale, rows, columns, expert_stride, row_stride, zero_scale,
    CHUNK: tl.constexpr, BF16: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A program a row."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1).to(tl.int64)
    offsets = tl.arange(0, CHUNK)
    pointers = weight + expert * expert_stride + row * row_stride + offsets
    largest = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, columns, CHUNK):
        largest = tl.maximum(largest, _magnitude_bits(_load(pointers + start, start + offsets < columns, BF16)))
    row_scale = _scale(tl.max(largest, 0), zero_scale, FORMAT)
    inverse = tl.div_rn(1.0, row_scale)
    for start in range(0, columns, CHUNK):
        inside = start + offsets < columns
        codes = _e4m3(_load(pointers + start, inside, BF16) * inverse, NATIVE)
        tl.store(out + (expert * rows + row) * columns + start + offsets, codes, mask=inside)
    tl.store(scale + expert * rows + row, row_scale)


def quantize_triton(
    weight: Tensor,
    out: Tensor,
    scale: Tensor,
    block: tuple[int, int],
    scale_format: ScaleFormat,
    zero_scale: float,
    *,
    native: bool | None = None,
) -> None:
    """As `quantize_torch`, for [experts, N, K], none of them 0.

    Args:
        weight: bfloat16, float16 or float32.
        out: float8_e4m3fn, contiguous.
        scale: [experts, row blocks, column blocks] float32, contiguous.
        block: rows and columns; (1, K) is channel-wise.
        scale_format: see `scales`.
        zero_scale: see `scales`.
        native: convert by the hardware's instruction. None: where there is one.
    """
    experts, rows, columns = weight.shape
    if native is None:
        native = torch.cuda.get_device_capability(weight.device) >= (8, 9)
    if weight.stride(2) != 1:
        weight = weight.contiguous()
    raw = weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
    operands = (raw, out.view(torch.uint8), scale, rows, columns, weight.stride(0), weight.stride(1), zero_scale)
    # Fused, a product and the sum that rounds it would be rounded once.
    options = {
        "BF16": weight.dtype == torch.bfloat16, "FORMAT": scale_format, "NATIVE": native, "enable_fp_fusion": False
    }  # fmt: skip
    tile = (triton.next_power_of_2(block[0]), triton.next_power_of_2(block[1]))
    _, row_blocks, column_blocks = scale.shape
    by_row = block == (1, columns)
    if experts > _LARGEST_GRID or (not by_row and (row_blocks > _LARGEST_GRID or tile[0] * tile[1] > LARGEST_TILE)):
        for expert in range(experts):
            quantize_torch(weight[expert], out[expert], scale[expert], block, scale_format, zero_scale)
    elif by_row and columns > LONGEST_ROW:
        _long_row_kernel[(rows, experts)](*operands, CHUNK=_LONG_CHUNK, num_warps=8, **options)
    elif by_row:
        height = max(1, _ROW_TILE // tile[1])
        _row_kernel[(triton.cdiv(rows, height), experts)](
            *operands, ROWS=height, COLUMNS=tile[1], num_warps=_warps(height * tile[1], ROW_VALUES_A_THREAD), **options
        )
    else:
        _block_kernel[(column_blocks, row_blocks, experts)](
            *operands, HEIGHT=block[0], WIDTH=block[1], TILE_ROWS=tile[0], TILE_COLUMNS=tile[1],
            num_warps=_warps(tile[0] * tile[1], BLOCK_VALUES_A_THREAD), **options,
        )  # fmt: skip


def _warps(values: int, values_a_thread: int) -> int:
    return min(16, max(1, values // (32 * values_a_thread)))
