"""The quantizers on a GPU: the same bits as on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.ops.fp8 import (
    Quantized,
    check_quantized,
    dequantize_blockwise,
    dequantize_channelwise,
    quantize_blockwise,
    quantize_channelwise,
)
from megatron_fp32.ops.fp8.scales import ScaleFormat
from tests.ops.fp8_cases import DTYPES, FORMATS, assert_same_bits, extremes, random_weight, ties

pytestmark = pytest.mark.gpu

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_format = pytest.mark.parametrize("scale_format", FORMATS)


def assert_same_on_both(weight: Tensor, block: tuple[int, int] = (128, 128), **options: Any) -> None:
    """Both quantizers, on both devices."""
    there = weight.cuda()
    assert_same_bits(quantize_blockwise(there, block, **options), quantize_blockwise(weight, block, **options))
    assert_same_bits(quantize_channelwise(there, **options), quantize_channelwise(weight, **options))


@by_dtype
@by_format
@pytest.mark.parametrize(
    "shape", [(1, 1), (128, 128), (129, 127), (1000, 1536), (3, 5000), (2, 260, 300), (300, 16384)]
)
def test_every_bit_is_the_cpus(shape: tuple[int, ...], dtype: torch.dtype, scale_format: ScaleFormat) -> None:
    assert_same_on_both(random_weight(*shape, dtype=dtype), scale_format=scale_format, zero_scale=0.5)


@by_dtype
@by_format
@pytest.mark.parametrize("make", [ties, extremes])
def test_ties_denormals_and_extremes_are_the_cpus(make: Any, dtype: torch.dtype, scale_format: ScaleFormat) -> None:
    assert_same_on_both(make(dtype), scale_format=scale_format)
    assert_same_on_both(make(dtype), (2, 3), scale_format=scale_format)


@pytest.mark.parametrize("columns", [128, 1 << 15])
def test_random_bits_are_quantized_as_on_the_cpu(columns: int) -> None:
    """Every exponent there is."""
    bits = torch.randint(-(2**31), 2**31, (2**22,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    values = bits.view(torch.float32)
    weight = torch.where(values.isfinite(), values, 0).view(-1, columns)
    assert_same_on_both(weight)
    assert_same_on_both(torch.where(weight.bfloat16().isfinite(), weight.bfloat16(), 0))


@by_dtype
def test_every_scale_is_the_cpus(dtype: torch.dtype) -> None:
    """One weight a row, so that every value of 16 bits, and many of 32, decides a scale."""
    if dtype == torch.float32:
        bits = torch.arange(0, 0x7F800000, 997, dtype=torch.int64).to(torch.int32)
    else:
        bits = torch.arange(1 << 15, dtype=torch.int16)
    values = bits.view(dtype)
    column = values[values.isfinite()][:, None]
    for scale_format in FORMATS:
        got = quantize_channelwise(column.cuda(), scale_format=scale_format)
        assert_same_bits(got, quantize_channelwise(column, scale_format=scale_format))


@pytest.mark.parametrize("block", [(1, 128), (16, 16), (48, 96), (128, 256), (256, 256), (128, 1)])
def test_other_blocks(block: tuple[int, int]) -> None:
    assert_same_on_both(random_weight(2, 300, 520, dtype=torch.bfloat16), block)


def test_more_row_blocks_than_a_grid_holds() -> None:
    assert_same_on_both(random_weight(70_000, 9, dtype=torch.bfloat16), (1, 4))


@pytest.mark.parametrize("columns", [16_384, 32_768, 32_769, 40_000])
@by_dtype
def test_long_rows(columns: int, dtype: torch.dtype) -> None:
    assert_same_on_both(random_weight(2, 7, columns, dtype=dtype))


def test_strides_change_nothing() -> None:
    base = random_weight(3, 300, 400, dtype=torch.bfloat16)
    views = (
        lambda t: t[0].t(),
        lambda t: t[1, ::2, 16:],
        lambda t: t[:, 7:150, 9:],
        lambda t: t.transpose(1, 2),
        lambda t: t.transpose(0, 1),
        lambda t: t[:1].expand(2, -1, -1),
    )
    there = base.cuda()
    for view in views:
        for quantize in (quantize_blockwise, quantize_channelwise):
            assert_same_bits(quantize(view(there)), quantize(view(base)))


def test_experts_beyond_two_to_the_31_values() -> None:
    """Offsets need 64 bits: the last expert is where they would wrap."""
    weight = torch.zeros(130, 4096, 4096, dtype=torch.bfloat16, device="cuda")
    weight[-1] = random_weight(4096, 4096, dtype=torch.bfloat16).cuda()
    for quantize in (quantize_blockwise, quantize_channelwise):
        got = quantize(weight)
        last = Quantized(got.weight[-1], got.scale[-1])
        assert_same_bits(last, quantize(weight[-1].cpu()))
        assert not got.weight[:-1].view(torch.uint8).any()
        del got, last


@by_dtype
def test_the_own_conversion_is_the_hardwares(dtype: torch.dtype) -> None:
    """What runs in the interpreter, and on GPUs without the instruction."""
    from megatron_fp32.ops.fp8.kernels import quantize_triton

    for weight in (ties(dtype), extremes(dtype), random_weight(300, 520, dtype=dtype)):
        for block in ((128, 128), (1, weight.shape[1])):
            results = []
            for native in (True, False):
                out = torch.empty(1, *weight.shape, dtype=torch.float8_e4m3fn, device="cuda")
                grid = (1, -(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
                scale = torch.empty(grid, device="cuda")
                quantize_triton(weight.cuda()[None], out, scale, block, "fp32", 1.0, native=native)
                results.append(Quantized(out, scale))
            assert_same_bits(*results)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@by_dtype
def test_infinity_and_nan_are_refused(dtype: torch.dtype, value: float) -> None:
    weight = random_weight(2, 260, 300, dtype=dtype)
    weight[1, 130, 299] = weight[1, 259, 0] = value
    weight = weight.cuda()
    for quantize in (quantize_blockwise, quantize_channelwise):
        with pytest.raises(ValueError, match=rf"cannot be quantized: weight\[1, 130, 299\] is {value}"):
            quantize(weight)
        later = {"bad": quantize(weight, check=False).scale, "good": quantize(weight[:1], check=False).scale}
        with pytest.raises(ValueError, match=r"cannot be quantized: bad$"):
            check_quantized(later)


def test_without_the_check_nothing_waits_for_the_device() -> None:
    weight = random_weight(300, 520, dtype=torch.bfloat16).cuda()
    quantize_blockwise(weight)
    quantize_channelwise(weight)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scales = {
            "a": quantize_blockwise(weight, check=False).scale,
            "b": quantize_channelwise(weight, check=False).scale,
        }
    finally:
        torch.cuda.set_sync_debug_mode(before)
    check_quantized(scales)


def test_dequantized_values_are_the_cpus() -> None:
    weight = random_weight(2, 260, 300, dtype=torch.bfloat16)
    blockwise, channelwise = quantize_blockwise(weight), quantize_channelwise(weight)
    for dtype in DTYPES:
        there = dequantize_blockwise(*(t.cuda() for t in blockwise), dtype=dtype)
        assert torch.equal(there.cpu(), dequantize_blockwise(*blockwise, dtype=dtype))
        there = dequantize_channelwise(*(t.cuda() for t in channelwise), dtype=dtype)
        assert torch.equal(there.cpu(), dequantize_channelwise(*channelwise, dtype=dtype))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_weight_on_another_gpu() -> None:
    weight = random_weight(130, 260, dtype=torch.bfloat16)
    assert_same_bits(quantize_blockwise(weight.to("cuda:1")), quantize_blockwise(weight))
