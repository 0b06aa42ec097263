"""The quantizers in one pass over a GPU's memory, bit-equal to `quantize_torch`.

A program holds its block in registers while it takes the largest magnitude, so that each weight is read once. Rows of
more than `LONGEST_ROW` are read twice, the second time from the cache.

Weights are loaded as integers, and magnitudes compared as such: that is their order, infinity is above every number and
NaN above infinity, and two 16-bit ones fit a register. Offsets within a block are 32-bit for the same reason.
"""

from __future__ import annotations

from megatron_fp32 import needs_triton  # noqa: F401

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fp32.ops.fp8.quantize_torch import quantize_torch
from megatron_fp32.ops.fp8.scales import E4M3_MAX, SMALLEST_SCALE, ScaleFormat

LONGEST_ROW = 32768
LARGEST_TILE = 1 << 15
BLOCK_VALUES_A_THREAD, ROW_VALUES_A_THREAD = 64, 32
_ROW_TILE, _LONG_CHUNK = 4096, 8192
_LARGEST_GRID = 65535
"""In any but the first dimension."""

_E4M3_MAX: tl.constexpr = tl.constexpr(E4M3_MAX)
_SMALLEST_SCALE: tl.constexpr = tl.constexpr(SMALLEST_SCALE)


@triton.jit
def _magnitudes(raw):  # type: ignore[no-untyped-def]
    """int32, without the sign."""
    if raw.dtype == tl.int16:
        return (raw & 0x7FFF).to(tl.int32)
    else:
        return raw & 0x7FFFFFFF


@triton.jit
def _widen(raw, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The float32 value of these bits, or of the bits that `_magnitudes` returns."""
    if DTYPE == "bfloat16":
        return (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif DTYPE == "float16":
        return raw.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return raw.to(tl.float32, bitcast=True)


@triton.jit
def _scale(amax, zero_scale, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """As `scales_of`. Triton's `/` is not an IEEE division, `div_rn` is."""
    scale = tl.maximum(tl.div_rn(amax, _E4M3_MAX), _SMALLEST_SCALE)
    scale = tl.where(amax == 0, zero_scale, scale)
    bits = scale.to(tl.int32, bitcast=True)
    if FORMAT == "bf16":
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
    if FORMAT == "ue8m0":
        bits = (bits + 0x7FFFFF) & 0x7F800000
    finite = amax.to(tl.int32, bitcast=True) < 0x7F800000
    return tl.where(finite, bits.to(tl.float32, bitcast=True), float("nan"))


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
    DTYPE: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A program a block; neighbours in a row run together."""
    first_row, first_column = tl.program_id(1) * HEIGHT, tl.program_id(0) * WIDTH
    expert = tl.program_id(2).to(tl.int64)
    row, column = tl.arange(0, TILE_ROWS)[:, None], tl.arange(0, TILE_COLUMNS)[None, :]
    inside = (row < tl.minimum(rows - first_row, HEIGHT)) & (column < tl.minimum(columns - first_column, WIDTH))
    weight += expert * expert_stride + first_row.to(tl.int64) * row_stride + first_column
    out += (expert * rows + first_row) * columns + first_column
    raw = tl.load(weight + (row * row_stride + column), mask=inside, other=0)
    amax = _widen(tl.max(tl.max(_magnitudes(raw), 1), 0), DTYPE)
    block_scale = _scale(amax, zero_scale, FORMAT)
    codes = _e4m3(_widen(raw, DTYPE) * tl.div_rn(1.0, block_scale), NATIVE)
    tl.store(out + (row * columns + column), codes, mask=inside)
    block = (expert * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(scale + block, block_scale)


@triton.jit
def _row_kernel(  # type: ignore[no-untyped-def]
    weight, out, scale, rows, columns, expert_stride, row_stride, zero_scale,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A program for so many rows as make a tile."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    expert = tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows - first_row)[:, None] & (column < columns)
    weight += expert * expert_stride + first_row * row_stride
    out += (expert * rows + first_row) * columns
    raw = tl.load(weight + (row[:, None] * row_stride + column), mask=inside, other=0)
    row_scale = _scale(_widen(tl.max(_magnitudes(raw), 1), DTYPE), zero_scale, FORMAT)
    codes = _e4m3(_widen(raw, DTYPE) * tl.div_rn(1.0, row_scale)[:, None], NATIVE)
    tl.store(out + (row[:, None] * columns + column), codes, mask=inside)
    tl.store(scale + expert * rows + first_row + row, row_scale, mask=row < rows - first_row)


@triton.jit
def _long_row_kernel(  # type: ignore[no-untyped-def]
    weight, out, scale, rows, columns, expert_stride, row_stride, zero_scale,
    CHUNK: tl.constexpr, DTYPE: tl.constexpr, FORMAT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A program a row."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1).to(tl.int64)
    offsets = tl.arange(0, CHUNK)
    weight += expert * expert_stride + row * row_stride
    out += (expert * rows + row) * columns
    largest = tl.zeros((CHUNK,), tl.int32)
    for start in range(0, columns, CHUNK):
        raw = tl.load(weight + start + offsets, mask=start + offsets < columns, other=0)
        largest = tl.maximum(largest, _magnitudes(raw))
    row_scale = _scale(_widen(tl.max(largest, 0), DTYPE), zero_scale, FORMAT)
    inverse = tl.div_rn(1.0, row_scale)
    for start in range(0, columns, CHUNK):
        inside = start + offsets < columns
        raw = tl.load(weight + start + offsets, mask=inside, other=0)
        tl.store(out + start + offsets, _e4m3(_widen(raw, DTYPE) * inverse, NATIVE), mask=inside)
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
    """As `quantize_torch`, for [experts, N, K], all of them positive.

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
    by_row = block == (1, columns)
    tile = (triton.next_power_of_2(block[0]), triton.next_power_of_2(block[1]))
    height = max(1, _ROW_TILE // tile[1]) if by_row else tile[0]
    if weight.stride(2) != 1 or weight.stride(1) * height >= 2**31:
        weight = weight.contiguous()
    _, row_blocks, column_blocks = scale.shape
    too_large = tile[0] * tile[1] > LARGEST_TILE or row_blocks > _LARGEST_GRID or columns * height >= 2**31
    if experts > _LARGEST_GRID or (too_large and not by_row):
        for expert in range(experts):
            quantize_torch(weight[expert], out[expert], scale[expert], block, scale_format, zero_scale)
        return
    raw = weight.view(torch.int16 if weight.dtype.itemsize == 2 else torch.int32)
    operands = (raw, out.view(torch.uint8), scale, rows, columns, weight.stride(0), weight.stride(1), zero_scale)
    options = {
        "DTYPE": str(weight.dtype).removeprefix("torch."), "FORMAT": scale_format, "NATIVE": native,
        # Fused, a product and the sum that rounds it would be rounded once.
        "enable_fp_fusion": False,
    }  # fmt: skip
    if by_row and columns > LONGEST_ROW:
        _long_row_kernel[(rows, experts)](*operands, CHUNK=_LONG_CHUNK, num_warps=8, **options)
    elif by_row:
        warps = _warps(height * tile[1], ROW_VALUES_A_THREAD)
        grid = (triton.cdiv(rows, height), experts)
        _row_kernel[grid](*operands, ROWS=height, COLUMNS=tile[1], num_warps=warps, **options)
    else:
        _block_kernel[(column_blocks, row_blocks, experts)](
            *operands, HEIGHT=block[0], WIDTH=block[1], TILE_ROWS=tile[0], TILE_COLUMNS=tile[1],
            num_warps=_warps(tile[0] * tile[1], BLOCK_VALUES_A_THREAD), **options,
        )  # fmt: skip


def _warps(values: int, values_a_thread: int) -> int:
    return min(16, max(1, values // (32 * values_a_thread)))
