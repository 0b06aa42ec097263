"""`fp32_logits`: values and gradients against float64. The `main_grad` protocol is in test_main_grad.py."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import gradients_reference, logits_reference, relative_error
from megatron_fp32.ops.products.operands import check_operands
from megatron_fp32.testing.cpu import single_process

HIDDEN, VOCAB = 64, 104
SIXTEEN_BIT = (torch.bfloat16, torch.float16)
DTYPES = (*SIXTEEN_BIT, torch.float32)
SHAPES = {
    "2d": (6, HIDDEN),
    "3d": (5, 2, HIDDEN),
    "4d": (3, 2, 2, HIDDEN),
    "batch of one": (7, 1, HIDDEN),
    "one token": (1, 1, HIDDEN),
}


def operands(dtype: torch.dtype, shape: tuple[int, ...] = (24, 2, HIDDEN)) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(shape).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).to(dtype).requires_grad_()
    return hidden, weight


def cotangent(hidden: Tensor) -> Tensor:
    return torch.randn(*hidden.shape[:-1], VOCAB)


def integers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Small integers: products and their sums are exact in fp32, and in bf16 the operands are."""
    return torch.randint(-8, 9, shape).to(dtype).requires_grad_()


class TestAgainstFloat64:
    @pytest.mark.parametrize("dtype", SIXTEEN_BIT)
    def test_logits_are_50_times_closer_than_the_16_bit_product(self, dtype: torch.dtype) -> None:
        hidden, weight = operands(dtype)
        truth = logits_reference(hidden, weight)
        logits = fp32_logits(hidden, weight)
        assert logits.dtype == torch.float32
        assert 50 * relative_error(logits, truth) < relative_error(F.linear(hidden, weight), truth)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_logits_are_as_close_as_torchs_fp32_product_of_the_same_values(self, dtype: torch.dtype) -> None:
        hidden, weight = operands(dtype)
        truth = logits_reference(hidden, weight)
        torch_error = relative_error(F.linear(hidden.float(), weight.float()), truth)
        assert relative_error(fp32_logits(hidden, weight), truth) <= 1.5 * torch_error

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_gradients_are_as_close_as_torchs(self, dtype: torch.dtype, with_bias: bool) -> None:
        hidden, weight = operands(dtype)
        bias = torch.randn(VOCAB).to(dtype).requires_grad_() if with_bias else None
        inputs = (hidden, weight) if bias is None else (hidden, weight, bias)
        grad = cotangent(hidden)
        # What autograd does for a layer of this dtype: dY is rounded once, the products are rounded when they leave.
        stock = torch.autograd.grad(F.linear(hidden, weight, bias), inputs, grad.to(dtype))
        ours = torch.autograd.grad(fp32_logits(hidden, weight, bias), inputs, grad)
        _, *truth = gradients_reference(hidden, weight, grad, bias)
        for name, mine, torchs, true in zip(("dX", "dW", "dbias"), ours, stock, truth, strict=False):
            assert mine.dtype == dtype
            assert relative_error(mine, true) <= 1.5 * relative_error(torchs, true), name

    def test_the_gradient_of_an_fp32_bias_is_the_fp32_sum_of_the_unrounded_cotangent(self) -> None:
        hidden, weight = operands(torch.bfloat16)
        bias, grad = torch.randn(VOCAB, requires_grad=True), cotangent(hidden)
        (ours,) = torch.autograd.grad(fp32_logits(hidden, weight, bias), bias, grad)
        truth = gradients_reference(hidden, weight, grad, bias).bias_grad
        assert ours.dtype == torch.float32
        assert relative_error(ours, truth) <= 2 * relative_error(grad.sum((0, 1)), truth)

    @pytest.mark.parametrize("offset", [-100.0, 1e4])
    def test_logits_far_from_zero_keep_their_fraction(self, offset: float) -> None:
        hidden, weight = operands(torch.bfloat16)
        with torch.no_grad():
            # One feature that is constant over the vocabulary moves every logit by `offset`.
            weight[:, 0] = 1.0
            hidden[..., 0] = offset
        truth = logits_reference(hidden, weight)
        assert truth.min() * torch.sign(truth.max()) > 90  # the whole tensor lies there
        torch_error = (F.linear(hidden.float(), weight.float()).double() - truth).abs().max()
        assert (fp32_logits(hidden, weight).double() - truth).abs().max() <= 4 * torch_error
        assert (F.linear(hidden, weight).double() - truth).abs().max() > 50 * torch_error


class TestIntegers:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
    def test_everything_is_bit_exact(self, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        hidden, weight, bias = integers(*shape, dtype=dtype), integers(VOCAB, HIDDEN, dtype=dtype), integers(VOCAB)
        grad = torch.randint(-8, 9, (*shape[:-1], VOCAB)).float()
        logits = fp32_logits(hidden, weight, bias)
        grads = torch.autograd.grad(logits, (hidden, weight, bias), grad)
        truth = gradients_reference(hidden, weight, grad, bias)
        assert torch.equal(logits.double(), truth.logits)
        for mine, true in zip(grads, truth[1:], strict=True):
            assert mine.shape == true.shape
            assert torch.equal(mine, true.to(mine.dtype))

    @pytest.mark.parametrize(
        "strided",
        [
            lambda x: x.transpose(0, 1),
            lambda x: x[-2:],
            lambda x: x[:, ::2],
            lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        ],
        ids=["transposed", "offset", "every other", "hidden outermost"],
    )
    def test_a_hidden_of_any_strides(self, strided: Callable[[Tensor], Tensor]) -> None:
        leaf, weight = integers(4, 6, HIDDEN), integers(VOCAB, HIDDEN)
        hidden = strided(leaf)
        assert not hidden.is_contiguous() or hidden.storage_offset() > 0
        grad = torch.randint(-8, 9, (*hidden.shape[:-1], VOCAB)).float()
        logits = fp32_logits(hidden, weight)
        grads = torch.autograd.grad(logits, (hidden, weight), grad)
        truth = gradients_reference(hidden, weight, grad)
        assert torch.equal(logits.double(), truth.logits)
        assert torch.equal(grads[0], truth.hidden_grad.bfloat16())
        assert torch.equal(grads[1], truth.weight_grad.bfloat16())

    @pytest.mark.parametrize(
        "make",
        [
            lambda shape: torch.randint(-8, 9, (1,)).float().expand(shape),
            lambda shape: torch.randint(-8, 9, shape[::-1]).float().permute(*reversed(range(len(shape)))),
            lambda shape: torch.randint(-8, 9, shape).double(),
            lambda shape: torch.randint(-8, 9, shape).bfloat16(),
        ],
        ids=["expanded", "non-contiguous", "fp64", "bf16"],
    )
    def test_any_cotangent(self, make: Callable[[tuple[int, ...]], Tensor]) -> None:
        hidden, weight = integers(5, 2, HIDDEN), integers(VOCAB, HIDDEN)
        grad = make((5, 2, VOCAB))
        grads = torch.autograd.grad(fp32_logits(hidden, weight), (hidden, weight), grad)
        truth = gradients_reference(hidden, weight, grad)
        assert torch.equal(grads[0], truth.hidden_grad.bfloat16())
        assert torch.equal(grads[1], truth.weight_grad.bfloat16())

    def test_a_weight_used_twice_gets_the_sum_of_both_gradients(self) -> None:
        first, second, weight = integers(5, 2, HIDDEN), integers(3, 2, HIDDEN), integers(VOCAB, HIDDEN)
        grads = [torch.randint(-1, 2, (*h.shape[:-1], VOCAB)).float() for h in (first, second)]
        torch.autograd.backward([fp32_logits(first, weight), fp32_logits(second, weight)], grads)
        truth = sum(gradients_reference(h, weight, g).weight_grad for h, g in zip((first, second), grads, strict=True))
        assert weight.grad is not None
        assert truth.abs().max() <= 256  # so bf16 holds the parts and the sum
        assert torch.equal(weight.grad.double(), truth)


class TestWhatNeedsNoGradient:
    def test_a_frozen_weight_gets_none_and_the_hidden_still_does(self) -> None:
        hidden, weight = integers(5, 2, HIDDEN), integers(VOCAB, HIDDEN).detach()
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(VOCAB, HIDDEN), False
        grad = torch.randint(-8, 9, (5, 2, VOCAB)).float()
        fp32_logits(hidden, weight).backward(grad)
        assert weight.grad is None
        assert not weight.main_grad.any()
        assert not weight.grad_added_to_main_grad
        assert torch.equal(hidden.grad, gradients_reference(hidden, weight, grad).hidden_grad.bfloat16())

    def test_a_hidden_without_gradient_leaves_the_weights_right(self) -> None:
        hidden, weight = integers(5, 2, HIDDEN).detach(), integers(VOCAB, HIDDEN)
        grad = torch.randint(-8, 9, (5, 2, VOCAB)).float()
        fp32_logits(hidden, weight).backward(grad)
        assert hidden.grad is None
        assert torch.equal(weight.grad, gradients_reference(hidden, weight, grad).weight_grad.bfloat16())

    def test_zero_tokens(self) -> None:
        hidden, weight, bias = integers(0, 2, HIDDEN), integers(VOCAB, HIDDEN), integers(VOCAB)
        logits = fp32_logits(hidden, weight, bias)
        assert logits.shape == (0, 2, VOCAB)
        logits.sum().backward()
        assert hidden.grad.shape == hidden.shape
        assert not weight.grad.any()
        assert not bias.grad.any()


class TestOwnership:
    @pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_the_output_may_be_divided_in_place(self, shape: tuple[int, ...], with_bias: bool) -> None:
        hidden, weight = integers(*shape), integers(VOCAB, HIDDEN)
        bias = integers(VOCAB) if with_bias else None
        logits = fp32_logits(hidden, weight, bias)
        assert not logits._is_view()
        # RL trainers transpose to [b, s, vocab] first, which at batch 1 is no copy.
        logits = logits.transpose(0, -2).contiguous()
        grad = 2.0 * torch.randint(-8, 9, logits.shape)
        logits.div_(2).backward(grad)
        truth = gradients_reference(hidden, weight, grad.transpose(0, -2) / 2, bias)
        assert torch.equal(hidden.grad, truth.hidden_grad.bfloat16())
        assert torch.equal(weight.grad, truth.weight_grad.bfloat16())

    def test_inputs_and_cotangent_are_never_changed(self) -> None:
        hidden, weight = operands(torch.bfloat16)
        bias, grad = torch.randn(VOCAB).bfloat16().requires_grad_(), cotangent(hidden)
        tensors = (hidden, weight, bias, grad)
        before = [t.detach().clone() for t in tensors]
        logits = fp32_logits(hidden, weight, bias)
        logits.backward(grad)
        logits.detach().zero_()  # cross entropy destroys the logits in place
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))

    def test_the_backward_pass_does_not_read_the_logits(self) -> None:
        hidden, weight = integers(5, 2, HIDDEN), integers(VOCAB, HIDDEN)
        grad = torch.randint(-8, 9, (5, 2, VOCAB)).float()
        logits = fp32_logits(hidden, weight)
        logits.data.fill_(float("nan"))
        logits.backward(grad)
        assert torch.equal(weight.grad, gradients_reference(hidden, weight, grad).weight_grad.bfloat16())

    def test_a_second_backward_pass_gives_the_same_gradients(self) -> None:
        hidden, weight = operands(torch.bfloat16)
        logits, grad = fp32_logits(hidden, weight), cotangent(hidden)
        first = torch.autograd.grad(logits, (hidden, weight), grad, retain_graph=True)
        second = torch.autograd.grad(logits, (hidden, weight), grad)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("power", [1, 2], ids=["constant upstream", "upstream with a gradient"])
    def test_a_gradient_of_the_gradient_is_refused(self, power: int) -> None:
        hidden, weight = operands(torch.float32)
        loss = fp32_logits(hidden, weight).pow(power).sum()
        (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            (loss + grad.square().sum()).backward()


class TestSurroundings:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("autocast_dtype", SIXTEEN_BIT)
    def test_autocast_changes_no_bit(self, dtype: torch.dtype, autocast_dtype: torch.dtype) -> None:
        hidden, weight = operands(dtype)
        bias, grad = torch.randn(VOCAB).to(dtype).requires_grad_(), cotangent(hidden)

        def everything() -> tuple[Tensor, ...]:
            logits = fp32_logits(hidden, weight, bias)
            return logits, *torch.autograd.grad(logits, (hidden, weight, bias), grad)

        plain = everything()
        with torch.autocast("cpu", dtype=autocast_dtype):
            inside = everything()
            assert torch.is_autocast_enabled("cpu")
        assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))

    @pytest.mark.parametrize("precision", ["high", "medium"])
    def test_matmul_precision_changes_no_bit(self, precision: str) -> None:
        hidden = torch.randn(64, 512).to(torch.float16).requires_grad_()
        weight = torch.randn(300, 512).to(torch.float16).requires_grad_()
        cotangent = torch.randn(64, 300)

        def run() -> list[Tensor]:
            hidden.grad = weight.grad = None
            logits = fp32_logits(hidden, weight)
            logits.backward(cotangent)
            return [logits.detach(), hidden.grad, weight.grad]

        plain, before = run(), torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            around, inside = run(), torch.get_float32_matmul_precision()
        finally:
            torch.set_float32_matmul_precision(before)
        assert inside == precision
        assert all(torch.equal(a, b) for a, b in zip(plain, around, strict=True))

    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_precision_settings_stay_as_they_were(self, precision: str) -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            settings = _precision_settings()
            hidden, weight = operands(torch.bfloat16)
            fp32_logits(hidden, weight).backward(cotangent(hidden))
            assert _precision_settings() == settings
        finally:
            torch.set_float32_matmul_precision(before)

    @pytest.mark.parametrize("setting", ["all backends", "mkldnn"])
    def test_a_precision_that_was_inherited_still_follows(self, setting: str) -> None:
        """A process of its own, where nobody has used torch's older settings."""
        where = "torch.backends" if setting == "all backends" else "torch.backends.mkldnn"
        script = f"""
            import torch
            from megatron_fp32 import fp32_logits
            hidden, weight = torch.randn(8, 64, requires_grad=True), torch.randn(30, 64, requires_grad=True)
            plain = fp32_logits(hidden, weight)
            {where}.fp32_precision = "bf16"
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            assert torch.equal(fp32_logits(hidden, weight), plain)
            try:
                fp32_logits(hidden, weight).backward(torch.ones(3))
            except RuntimeError:
                pass
            fp32_logits(hidden, weight).sum().backward()
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            assert torch.backends.mkldnn.enabled
            {where}.fp32_precision = "ieee"
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        """
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr

    @pytest.mark.parametrize("precision", ["high", "medium"])
    def test_fp32_operands_on_cuda_are_refused_under_tf32(self, precision: str) -> None:
        before = torch.get_float32_matmul_precision()
        full: Any = SimpleNamespace(dtype=torch.float32, is_cuda=True)
        half: Any = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True)
        check_operands(full, full, names=("hidden", "weight"))
        torch.set_float32_matmul_precision(precision)
        try:
            check_operands(half, half, names=("hidden", "weight"))
            with pytest.raises(ValueError, match=r"hidden and weight are float32 and TF32 is allowed"):
                check_operands(full, full, names=("hidden", "weight"))
        finally:
            torch.set_float32_matmul_precision(before)


def _precision_settings() -> tuple[Any, ...]:
    matmul = torch.backends.cuda.matmul
    return (
        torch.get_float32_matmul_precision(),
        matmul.allow_tf32,
        matmul.fp32_precision,
        matmul.allow_bf16_reduced_precision_reduction,
        matmul.allow_fp16_reduced_precision_reduction,
        torch.backends.mkldnn.matmul.fp32_precision,
    )


class TestRefusals:
    @pytest.mark.parametrize(
        ("hidden", "weight"),
        [
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float16),
            (torch.float64, torch.float64),
            (torch.int64, torch.int64),
        ],
    )
    def test_dtypes(self, hidden: torch.dtype, weight: torch.dtype) -> None:
        with pytest.raises(TypeError, match=f"must both be bfloat16, float16 or float32, .*got {hidden} and {weight}"):
            fp32_logits(torch.zeros(2, 4, dtype=hidden), torch.zeros(3, 4, dtype=weight))

    @pytest.mark.parametrize(
        ("hidden", "weight"),
        [((4,), (3, 4)), ((2, 4), (3, 5)), ((2, 4), (4,)), ((2, 4), (1, 3, 4))],
    )
    def test_shapes(self, hidden: tuple[int, ...], weight: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"expected hidden \[\.\.\., hidden\] .* weight \[vocab, hidden\], got"):
            fp32_logits(torch.zeros(hidden), torch.zeros(weight))

    @pytest.mark.parametrize("shape", [(4,), (1,), (1, 3)])
    def test_bias_shape(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match=r"expected bias \[3\], got"):
            fp32_logits(torch.zeros(2, 4), torch.zeros(3, 4), torch.zeros(shape))

    def test_grad_precision(self) -> None:
        with pytest.raises(
            ValueError, match=r"grad_precision must be one of \('bf16', 'bf16x2', 'bf16x3'\), got 'fp8'"
        ):
            fp32_logits(torch.zeros(2, 4), torch.zeros(3, 4), grad_precision="fp8")  # type: ignore[arg-type]

    def test_dtensors(self) -> None:
        with single_process():
            mesh = DeviceMesh("cpu", [0])
            weight = distribute_tensor(torch.zeros(3, 4), mesh, [Replicate()])
            with pytest.raises(TypeError, match=r"must be a plain tensor, with the process group .*, got a DTensor"):
                fp32_logits(torch.zeros(2, 4), weight)
