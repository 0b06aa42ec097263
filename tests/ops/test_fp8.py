"""float8 quantization on the CPU against its definition in float64; the kernels, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_fp32.ops.fp8 import (
    check_quantized,
    dequantize_blockwise,
    dequantize_channelwise,
    quantize_blockwise,
    quantize_channelwise,
)
from megatron_fp32.ops.fp8 import quantize_torch as module
from megatron_fp32.ops.fp8.reference import (
    dequantize_reference,
    e4m3_reference,
    e4m3_values,
    quantize_reference,
)
from megatron_fp32.ops.fp8.scales import ScaleFormat, scales_of
from tests.ops.fp8_cases import (
    DTYPES,
    FORMATS,
    SHAPES,
    assert_is_reference,
    assert_same_bits,
    extremes,
    random_weight,
    ties,
)
from tests.ops.interpreter import names_of, run_in_interpreter

by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_format = pytest.mark.parametrize("scale_format", FORMATS)


class TestTheReferenceItself:
    def test_its_values_are_those_of_torch(self) -> None:
        codes = torch.arange(0x7F, dtype=torch.uint8)
        assert torch.equal(e4m3_values(), codes.view(torch.float8_e4m3fn).double())

    def test_it_rounds_as_torch_does_below_the_largest_value(self) -> None:
        """torch turns what is too large into NaN; the reference into 448."""
        values = torch.cat([ties(torch.float32).flatten(), torch.randn(5000), torch.randn(5000) * 2.0**-8])
        assert torch.equal(e4m3_reference(values), values.to(torch.float8_e4m3fn).view(torch.uint8))
        assert e4m3_reference(torch.tensor([464.1, 1e30, -1e30])).tolist() == [0x7E, 0x7E, 0xFE]


@by_dtype
@by_format
@pytest.mark.parametrize("shape", SHAPES)
def test_every_bit_is_the_definitions(shape: tuple[int, int], dtype: torch.dtype, scale_format: ScaleFormat) -> None:
    weight = random_weight(*shape, dtype=dtype)
    assert_is_reference(
        quantize_blockwise(weight, scale_format=scale_format), weight, (128, 128), scale_format=scale_format
    )
    assert_is_reference(
        quantize_channelwise(weight, scale_format=scale_format, zero_scale=0.5),
        weight,
        (1, shape[1]),
        scale_format=scale_format,
        zero_scale=0.5,
    )


@by_dtype
@by_format
@pytest.mark.parametrize("make", [ties, extremes])
def test_ties_denormals_and_extremes_are_the_definitions(
    make: type[Tensor], dtype: torch.dtype, scale_format: ScaleFormat
) -> None:
    weight = make(dtype)
    for block in ((1, weight.shape[1]), (2, 3), (128, 128)):
        got = quantize_blockwise(weight, block, scale_format=scale_format)
        assert_is_reference(got, weight, block, scale_format=scale_format)
        assert not got.weight.float().isnan().any()


weights = st.tuples(
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 255), min_size=64, max_size=64).map(bytes),
    st.integers(1, 9),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from(FORMATS),
    st.sampled_from([1.0, 2.0**-23, 3.0]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(drawn=weights)
def test_any_bits_of_any_shape_are_quantized_as_defined(
    drawn: tuple[torch.dtype, bytes, int, tuple[int, int], ScaleFormat, float],
) -> None:
    dtype, raw, columns, block, scale_format, zero_scale = drawn
    values = torch.frombuffer(bytearray(raw), dtype=dtype)
    values = torch.where(values.isfinite(), values, 0)
    weight = values[: len(values) // columns * columns].view(-1, columns)
    options = {"scale_format": scale_format, "zero_scale": zero_scale}
    assert_is_reference(quantize_blockwise(weight, block, **options), weight, block, **options)


def test_no_magnitude_leads_to_nan_or_beyond_the_largest_value() -> None:
    """The largest weight of a block is 448 or, where the scale was rounded up, less: all mantissas, some exponents."""
    mantissas = torch.arange(1 << 23, dtype=torch.int32)[::37]
    for exponent in (0, 1, 5, 127, 200, 254):
        amax = (mantissas + (exponent << 23)).view(torch.float32)
        for scale_format in FORMATS:
            scale = scales_of(amax, scale_format, 1.0)
            product = amax * scale.reciprocal()
            assert scale.isfinite().all()
            assert (scale > 0).all()
            assert product.max() < 464


@by_dtype
@by_format
def test_the_error_is_the_formats_own(dtype: torch.dtype, scale_format: ScaleFormat) -> None:
    """Half a unit in the last of 4 bits, or of the smallest value where that is larger."""
    weight = random_weight(200, 300, dtype=dtype)
    for got, values in (
        ((q := quantize_blockwise(weight, scale_format=scale_format)), dequantize_blockwise(*q)),
        ((q := quantize_channelwise(weight, scale_format=scale_format)), dequantize_channelwise(*q)),
    ):
        block = (128, 128) if got.scale.shape == (2, 3) else (1, 300)
        scale = dequantize_reference(torch.full_like(got.weight.view(torch.uint8), 0x38), got.scale, block)
        # A bfloat16 scale that was rounded down cuts the largest values by as much.
        saturated = 2.0**-8 if scale_format == "bf16" else 2.0**-22
        bound = torch.maximum(weight.double().abs() * (2.0**-4 + saturated), scale * 2.0**-10) * (1 + 2.0**-20)
        assert ((values.double() - weight.double()).abs() <= bound).all()


@by_dtype
def test_dequantized_values_are_the_exact_products_rounded_once(dtype: torch.dtype) -> None:
    weight = random_weight(131, 140, dtype=torch.float32)
    codes, scales = quantize_reference(weight, (128, 128))
    exact = dequantize_reference(codes, scales, (128, 128))
    got = dequantize_blockwise(*quantize_blockwise(weight), dtype=dtype)
    assert torch.equal(got, exact.float().to(dtype))
    codes, scales = quantize_reference(weight, (1, 140))
    got = dequantize_channelwise(*quantize_channelwise(weight), dtype=dtype)
    assert torch.equal(got, dequantize_reference(codes, scales, (1, 140)).float().to(dtype))


def test_experts_are_quantized_each_for_itself() -> None:
    weight = random_weight(3, 130, 140, dtype=torch.bfloat16)
    blockwise, channelwise = quantize_blockwise(weight), quantize_channelwise(weight)
    assert tuple(blockwise.scale.shape) == (3, 2, 2)
    assert tuple(channelwise.scale.shape) == (3, 130, 1)
    for expert in range(3):
        assert_is_reference(type(blockwise)(*(t[expert] for t in blockwise)), weight[expert], (128, 128))
        assert_is_reference(type(blockwise)(*(t[expert] for t in channelwise)), weight[expert], (1, 140))
    assert torch.equal(dequantize_blockwise(*blockwise)[1], dequantize_blockwise(*(t[1] for t in blockwise)))
    assert torch.equal(dequantize_channelwise(*channelwise)[1], dequantize_channelwise(*(t[1] for t in channelwise)))


def test_strides_change_nothing() -> None:
    base = random_weight(2, 300, 280, dtype=torch.bfloat16)
    for weight in (
        base[0].t(),
        base[0, ::2, 3::2],
        base[:, 7:150, 9:],
        base.transpose(1, 2),
        base[:1].expand(2, -1, -1),
    ):
        assert_same_bits(quantize_blockwise(weight), quantize_blockwise(weight.contiguous()))
        assert_same_bits(quantize_channelwise(weight), quantize_channelwise(weight.contiguous()))


@pytest.mark.parametrize("slab", [1, 600, 40_000, 1 << 30])
def test_slabs_change_nothing(slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(300, 500, dtype=torch.bfloat16)
    monkeypatch.setattr(module, "SLAB", slab)
    for block in ((128, 128), (16, 50), (300, 500)):
        assert_is_reference(quantize_blockwise(weight, block), weight, block)
    assert_is_reference(quantize_channelwise(weight), weight, (1, 500))


def test_memory_beside_the_output_does_not_grow_with_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that is made on the way is counted; the largest is the output."""
    monkeypatch.setattr(module, "SLAB", 1 << 14)
    sizes: list[int] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                sizes.append(result.untyped_storage().nbytes())
            return result

    weight = torch.randn(1024, 512).bfloat16()
    with Count():
        quantize_blockwise(weight, (128, 128))
        quantize_channelwise(weight)
    buffers = [size for size in sizes if size not in (weight.nbytes, weight.numel())]
    assert max(buffers) <= 2 * 4 * (1 << 14)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (2, 0, 7), (0, 3, 4)])
def test_empty_weights(shape: tuple[int, ...]) -> None:
    weight = torch.empty(shape, dtype=torch.bfloat16)
    got = quantize_blockwise(weight)
    assert tuple(got.weight.shape) == shape
    assert tuple(got.scale.shape) == (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    assert tuple(dequantize_blockwise(*got).shape) == shape
    channels = quantize_channelwise(weight)
    assert tuple(channels.scale.shape) == (*shape[:-1], 1)
    assert (channels.scale == 1).all()
    assert tuple(dequantize_channelwise(*channels).shape) == shape


def test_a_gradient_is_no_obstacle_and_none_is_recorded() -> None:
    weight = torch.randn(4, 4, requires_grad=True)
    got = quantize_blockwise(weight)
    assert not got.scale.requires_grad


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@by_dtype
class TestInfinityAndNaN:
    def weight(self, dtype: torch.dtype, value: float) -> Tensor:
        weight = random_weight(2, 260, 300, dtype=dtype)
        weight[1, 130, 299] = weight[1, 259, 0] = value
        return weight

    def test_are_refused_with_their_place(self, dtype: torch.dtype, value: float) -> None:
        weight = self.weight(dtype, value)
        with pytest.raises(ValueError, match=rf"cannot be quantized: weight\[1, 130, 299\] is {value}"):
            quantize_blockwise(weight)
        with pytest.raises(ValueError, match=rf"cannot be quantized: weight\[130, 299\] is {value}"):
            quantize_channelwise(weight[1])

    def test_are_found_later(self, dtype: torch.dtype, value: float) -> None:
        bad, good = self.weight(dtype, value), random_weight(8, 8, dtype=dtype)
        scales = {
            "good": quantize_blockwise(good, check=False).scale,
            "bad": quantize_blockwise(bad, check=False, scale_format="bf16").scale,
            "rows": quantize_channelwise(bad[1], check=False, scale_format="ue8m0").scale,
        }
        assert scales["bad"].isnan().nonzero().tolist() == [[1, 1, 2], [1, 2, 0]]
        with pytest.raises(ValueError, match=r"cannot be quantized: bad, rows$"):
            check_quantized(scales)
        check_quantized({"good": scales["good"]})
        check_quantized({})


class TestRefuses:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
    def test_other_dtypes(self, dtype: torch.dtype) -> None:
        with pytest.raises(TypeError, match=f"must be bfloat16, float16 or float32, got {dtype}"):
            quantize_blockwise(torch.zeros(2, 2).to(dtype))

    @pytest.mark.parametrize("shape", [(3,), (), (2, 2, 2, 2)])
    def test_other_numbers_of_dimensions(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"must be \[N, K\] or \[experts, N, K\]"):
            quantize_channelwise(torch.zeros(shape))

    @pytest.mark.parametrize("block", [(0, 128), (128,), (-1, 1)])
    def test_blocks_without_weights(self, block: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="a block must have"):
            quantize_blockwise(torch.zeros(2, 2), block)

    def test_an_unknown_format(self) -> None:
        with pytest.raises(ValueError, match=r"must be one of .*got 'fp64'"):
            quantize_channelwise(torch.zeros(2, 2), scale_format="fp64")  # type: ignore[arg-type]

    def test_scales_of_another_weight(self) -> None:
        got = quantize_blockwise(torch.zeros(129, 4))
        with pytest.raises(ValueError, match=r"must be \(1, 1\), got \(2, 1\)"):
            dequantize_blockwise(got.weight[:128], got.scale)
        with pytest.raises(ValueError, match=r"must be \(129, 1\), got \(2, 1\)"):
            dequantize_channelwise(*got)


KERNELS = "tests.ops.interpreted_fp8"


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return run_in_interpreter(KERNELS)


@pytest.mark.parametrize("name", names_of(KERNELS))
def test_the_kernels_return_the_same_bits(interpreted: dict[str, str], name: str) -> None:
    assert not interpreted[name], interpreted[name]
