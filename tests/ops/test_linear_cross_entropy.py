"""Losses of the head without logits against torch's cross entropy in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import linear_cross_entropy, weighted_cross_entropy
from tests.ops.logprobs_cases import (
    HIDDEN,
    PADDED,
    ROWS,
    TOKENS,
    VOCAB,
    Case,
    case,
    grouped,
    rounded_error,
    with_main_grad,
)

SMOOTH: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}
BENT: dict[str, Any] = {**SMOOTH, "softcap": 5.0, "scale": 1.3, "temperature": 0.7}
OPTIONS = pytest.mark.parametrize("options", [{}, SMOOTH, BENT], ids=["plain", "smooth", "bent"])
FP32 = 1e-6


def truth(c: Case, weights: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, dX and dW in float64, of the weighted sum."""
    x, w = c.hidden.detach().double().requires_grad_(), c.weight.detach().double().requires_grad_()
    z = (x @ w.t())[:, :VOCAB] * options.get("scale", 1.0)
    if "softcap" in options:
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    z = z / options.get("temperature", 1.0)
    losses = torch.nn.functional.cross_entropy(
        z, c.labels, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    losses = losses + options.get("z_loss", 0.0) * z.logsumexp(1).square() * (c.labels != -100)
    (losses * weights).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    return losses.detach(), x.grad, w.grad


class TestPerToken:
    @OPTIONS
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_against_float64(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        c, weights = case(dtype), torch.rand(TOKENS)
        losses = linear_cross_entropy(
            c.hidden, c.weight, c.labels, vocab_parallel=PADDED, grad_precision="bf16x3", **grouped(options)
        )
        losses.backward(weights)
        exact, dx, dw = truth(c, weights, options)
        assert relative_error(losses.detach(), exact) < FP32
        assert losses[3] == 0
        assert relative_error(c.hidden.grad, dx) < 1.05 * rounded_error(dx, dtype) + 2 * FP32
        assert relative_error(c.weight.grad, dw) < 1.05 * rounded_error(dw, dtype) + 2 * FP32

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"label_smoothing": 1.0}, "label_smoothing must be at least 0 and less than 1"),
            ({"label_smoothing": -0.1}, "label_smoothing must be at least 0 and less than 1"),
            ({"z_loss": -1.0}, "z_loss must not be negative"),
        ],
    )
    def test_refusals(self, changes: dict[str, Any], message: str) -> None:
        c = case()
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(c.hidden, c.weight, c.labels, **changes)

    @pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
    @pytest.mark.parametrize("operator", ["each", "weighted"])
    def test_smoothing_far_from_zero(self, operator: str, level: float) -> None:
        """Logsumexp and mean logit have lost these digits; the mean of log p has not."""
        torch.manual_seed(0)
        # Exact in float32: the first hidden unit shifts all logits of a token alike.
        hidden = torch.cat([torch.full((20, 1), level), torch.randint(-8, 9, (20, 8)).float()], 1)
        weight = torch.cat([torch.ones(300, 1), torch.randint(-8, 9, (300, 8)) / 32], 1)
        c = Case(hidden=hidden, weight=weight, labels=torch.randint(300, (20,))).copy()
        z = hidden.double() @ weight.double().t()
        exact = torch.nn.functional.cross_entropy(z, c.labels, reduction="none", label_smoothing=0.1)
        if operator == "weighted":
            losses = weighted_cross_entropy(c.hidden, c.weight, c.labels, torch.ones(20), label_smoothing=0.1).losses
        else:
            losses = linear_cross_entropy(c.hidden, c.weight, c.labels, label_smoothing=0.1).detach()
        torchs = torch.nn.functional.cross_entropy(z.float(), c.labels, reduction="none", label_smoothing=0.1)
        assert relative_error(losses, exact) < max(FP32 / 2, relative_error(torchs, exact))

    @pytest.mark.parametrize("operator", ["each", "weighted"])
    @pytest.mark.parametrize("options", [{}, SMOOTH], ids=["plain", "smooth"])
    def test_a_gradient_penalty_is_refused(self, operator: str, options: dict[str, Any]) -> None:
        c = case(torch.float32)
        if operator == "weighted":
            loss = weighted_cross_entropy(c.hidden, c.weight, c.labels, torch.rand(TOKENS), **options).total
        else:
            loss = linear_cross_entropy(c.hidden, c.weight, c.labels, **options).sum()
        (grad,) = torch.autograd.grad(loss, c.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            (loss + 10 * grad.square().sum()).backward()


class TestWeighted:
    @OPTIONS
    @pytest.mark.parametrize("chunk_size", [None, 64])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_against_float64(self, dtype: torch.dtype, chunk_size: int | None, options: dict[str, Any]) -> None:
        c, weights = case(dtype), torch.rand(TOKENS)
        weights[9] = 0
        out = weighted_cross_entropy(
            c.hidden, c.weight, c.labels, weights, vocab_parallel=PADDED, grad_precision="bf16x3",
            chunk_size=chunk_size, **grouped(options),
        )  # fmt: skip
        out.total.backward()
        exact, dx, dw = truth(c, weights, options)
        assert relative_error(out.losses, exact * (weights != 0)) < FP32
        assert relative_error(out.total.detach(), (exact * weights).sum()) < FP32
        assert not out.losses.requires_grad
        assert relative_error(c.hidden.grad, dx) < 1.05 * rounded_error(dx, dtype) + 2 * FP32
        assert relative_error(c.weight.grad, dw) < 1.05 * rounded_error(dw, dtype) + 2 * FP32

    def test_the_gradient_of_the_total_scales_everything(self) -> None:
        c, weights = case(torch.float16), torch.rand(TOKENS) / 8192
        out = weighted_cross_entropy(c.hidden, c.weight, c.labels, weights, vocab_parallel=PADDED, grad_scale=65536.0)
        (out.total * 65536).backward()
        _, dx, dw = truth(c, weights * 65536, {})
        assert relative_error(c.hidden.grad, dx) < 5e-4, "dY underflows in float16 without the scale"
        assert relative_error(c.weight.grad, dw) < 5e-4

    def test_main_grad_takes_dw_in_the_forward_pass(self) -> None:
        c, weights = case(torch.float32), torch.rand(TOKENS)
        weight = with_main_grad(c.weight)
        weight.main_grad.fill_(1)
        out = weighted_cross_entropy(c.hidden, weight, c.labels, weights, vocab_parallel=PADDED, grad_scale=0.5)
        _, dx, dw = truth(c, weights * 0.5, {})
        assert relative_error(weight.main_grad - 1, dw) < 1e-5
        assert not weight.grad_added_to_main_grad, "the hook of DDP would find no gradient yet"
        seen = []
        weight.register_hook(lambda grad: seen.append((grad.shape, weight.grad_added_to_main_grad)))
        (out.total * 0.5).backward()
        assert seen == [(weight.shape, True)]
        assert relative_error(c.hidden.grad, dx) < 2 * FP32

    @pytest.mark.parametrize("main_grad", [False, True])
    def test_nothing_can_be_scaled_afterwards(self, main_grad: bool) -> None:
        c = case()
        weight = with_main_grad(c.weight) if main_grad else c.weight
        out = weighted_cross_entropy(c.hidden, weight, c.labels, torch.ones(TOKENS), vocab_parallel=PADDED)
        with pytest.raises(RuntimeError, match=r"received the gradient 2\.0, and grad_scale was 1\.0"):
            (out.total * 2).backward()

    def test_a_scale_that_was_divided_twice(self) -> None:
        """1 / (a b) and 1 / a / b differ by their rounding, which no gradient shows."""
        c, weights = case(torch.float32), torch.rand(TOKENS)
        _, dx, _ = truth(c, weights, {})
        for a in range(1, 64, 7):
            for b in range(1, 64, 5):
                scale = 1 / (a * b)
                out = weighted_cross_entropy(
                    c.hidden, c.weight, c.labels, weights, vocab_parallel=PADDED, grad_scale=scale
                )
                (grad,) = torch.autograd.grad(out.total / a / b, c.hidden)
                assert relative_error(grad, dx * scale) < 2 * FP32

    @pytest.mark.parametrize(("difference", "passes"), [(2.0**-21, True), (2.0**-19, False), (-(2.0**-19), False)])
    @pytest.mark.parametrize("scale", [1.0, -65536.0, 1e-30])
    def test_how_much_the_scale_may_differ(self, scale: float, difference: float, passes: bool) -> None:
        c = case()
        out = weighted_cross_entropy(
            c.hidden, c.weight, c.labels, torch.ones(TOKENS), vocab_parallel=PADDED, grad_scale=scale
        )
        if passes:
            (out.total * (scale * (1 + difference))).backward()
            return
        with pytest.raises(RuntimeError, match="Pass the gradient that total will receive as grad_scale"):
            (out.total * (scale * (1 + difference))).backward()

    @pytest.mark.parametrize("upstream", [math.nan, math.inf, 0.0])
    def test_a_gradient_that_is_no_scale(self, upstream: float) -> None:
        c = case()
        out = weighted_cross_entropy(c.hidden, c.weight, c.labels, torch.ones(TOKENS), vocab_parallel=PADDED)
        with pytest.raises(RuntimeError, match=f"received the gradient {upstream}"):
            out.total.backward(torch.tensor(upstream))

    def test_hooks_that_may_run_the_forward_pass_twice(self) -> None:
        c, weights = case(), torch.rand(TOKENS)
        weight = with_main_grad(c.weight)
        with pytest.raises(RuntimeError, match="saved-tensor hooks may run twice"):
            torch.utils.checkpoint.checkpoint(
                lambda h: weighted_cross_entropy(h, weight, c.labels, weights, vocab_parallel=PADDED).total,
                c.hidden,
                use_reentrant=False,
            )
        assert not weight.main_grad.any()

    def test_gradients_do_not_outlive_the_backward_pass(self) -> None:
        c = case()
        out = weighted_cross_entropy(c.hidden, c.weight, c.labels, torch.ones(TOKENS), vocab_parallel=PADDED)
        out.total.backward()
        assert out.total.grad_fn.target is None
        with pytest.raises(RuntimeError, match="second time"):
            out.total.grad_fn.saved_tensors  # noqa: B018

    def test_a_second_backward_pass(self) -> None:
        c = case()
        out = weighted_cross_entropy(c.hidden, c.weight, c.labels, torch.ones(TOKENS), vocab_parallel=PADDED)
        first = torch.autograd.grad(out.total, (c.hidden, c.weight), retain_graph=True)
        second = torch.autograd.grad(out.total, (c.hidden, c.weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        out = weighted_cross_entropy(
            c.hidden, with_main_grad(c.weight), c.labels, torch.ones(TOKENS), vocab_parallel=PADDED
        )
        out.total.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="a second backward pass would need a second dW"):
            out.total.backward()

    def test_without_gradients_main_grad_is_left_alone(self) -> None:
        c = case()
        with torch.no_grad():
            out = weighted_cross_entropy(
                c.hidden, with_main_grad(c.weight), c.labels, torch.ones(TOKENS), vocab_parallel=PADDED
            )
        assert not c.weight.main_grad.any()
        exact, _, _ = truth(c, torch.ones(TOKENS), {})
        assert relative_error(out.total, exact.sum()) < FP32

    def test_activation_recompute_adds_dw_once(self) -> None:
        c, weights = case(torch.float32), torch.rand(TOKENS)
        weight = with_main_grad(c.weight)
        total = torch.utils.checkpoint.checkpoint(
            lambda h: weighted_cross_entropy(h, weight, c.labels, weights, vocab_parallel=PADDED).total,
            c.hidden,
            use_reentrant=True,
        )
        total.backward()
        _, dx, dw = truth(c, weights, {})
        assert relative_error(weight.main_grad, dw) < 2 * FP32
        assert relative_error(c.hidden.grad, dx) < 2 * FP32

    @pytest.mark.parametrize("frozen", ["hidden", "weight"])
    def test_frozen(self, frozen: str) -> None:
        c, weights = case(torch.float32), torch.rand(TOKENS)
        getattr(c, frozen).requires_grad_(False)
        weighted_cross_entropy(c.hidden, c.weight, c.labels, weights, vocab_parallel=PADDED).total.backward()
        _, dx, dw = truth(c, weights, {})
        if frozen == "hidden":
            assert c.hidden.grad is None
            assert relative_error(c.weight.grad, dw) < 2 * FP32
        else:
            assert c.weight.grad is None
            assert relative_error(c.hidden.grad, dx) < 2 * FP32

    def test_no_tokens(self) -> None:
        hidden, weight = torch.zeros(0, HIDDEN).requires_grad_(), torch.randn(ROWS, HIDDEN).requires_grad_()
        out = weighted_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), torch.zeros(0))
        out.total.backward()
        assert out.total == 0
        assert hidden.grad.shape == (0, HIDDEN)
        assert not weight.grad.any()

    def test_weights_of_another_shape_are_refused(self) -> None:
        c = case()
        with pytest.raises(ValueError, match="loss_weights without gradient and of the labels' shape"):
            weighted_cross_entropy(c.hidden, c.weight, c.labels, torch.ones(3))
        with pytest.raises(ValueError, match="requires_grad=True"):
            weighted_cross_entropy(c.hidden, c.weight, c.labels, torch.ones(TOKENS, requires_grad=True))
