"""Temperatures of every shape against float64, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import linear_cross_entropy, linear_logprobs, weighted_cross_entropy
from megatron_fp32.ops.logprobs.options import inverse_temperature_of

S, B, HIDDEN, VOCAB = 9, 5, 24, 70
FP32 = 1e-6


def problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(VOCAB, (S, B))
    labels[2, 3] = -100
    return torch.randn(S, B, HIDDEN).requires_grad_(), torch.randn(VOCAB, HIDDEN).requires_grad_(), labels


def truth(hidden: Tensor, weight: Tensor, labels: Tensor, each: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the labels, dX and dW in float64; `each` [s, b]."""
    x, w = (t.detach().double().requires_grad_() for t in (hidden, weight))
    p = ((x @ w.t()) / each.double()[..., None]).log_softmax(-1)
    p = torch.where(labels == -100, 0.0, p.gather(-1, labels.clamp(min=0)[..., None])[..., 0])
    grads = torch.autograd.grad((p * g).sum(), (x, w))
    return p.detach(), *grads


@pytest.mark.parametrize("shape", [(), (1,), (B,), (1, B), (S, 1), (1, 1), (S, B)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("operator", ["logprobs", "loss", "weighted"])
def test_shapes_against_float64(operator: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    hidden, weight, labels = problem()
    temperature = (torch.rand(shape) * 2 + 1).to(dtype)
    g = torch.rand(S, B)
    if operator == "logprobs":
        values = linear_logprobs(hidden, weight, labels, temperature=temperature).logprobs
        values.backward(g)
    elif operator == "loss":
        losses = linear_cross_entropy(hidden, weight, labels, temperature=temperature)
        losses.backward(-g)
        values = -losses
    else:
        out = weighted_cross_entropy(hidden, weight, labels, -g, temperature=temperature)
        out.total.backward()
        values = -out.losses
    exact, dx, dw = truth(hidden, weight, labels, temperature.expand(S, B), g)
    assert relative_error(values.detach(), exact) < FP32
    assert relative_error(hidden.grad, dx) < 2 * FP32
    assert relative_error(weight.grad, dw) < 2 * FP32


def test_a_bad_one_touches_its_sequence_alone() -> None:
    hidden, weight, labels = problem()
    good = torch.rand(B) + 0.5
    clean = linear_logprobs(hidden, weight, labels, temperature=good)
    clean.logprobs.sum().backward()
    expected, hidden.grad = hidden.grad.clone(), None
    for bad in (0.0, -1.0, torch.nan, torch.inf, 1e-44):
        each = good.clone()
        each[3] = bad
        out = linear_logprobs(hidden, weight, labels, temperature=each)
        others = torch.arange(B) != 3
        assert torch.equal(out.logprobs[:, others], clean.logprobs[:, others])
        # The label of token (2, 3) is ignored.
        assert out.logprobs[:, 3].isnan().tolist() == [s != 2 for s in range(S)]
        assert out.logprobs[2, 3] == 0
        hidden.grad = None
        out.logprobs.sum().backward()
        assert torch.equal(hidden.grad[:, others], expected[:, others])
        assert hidden.grad[:, 3].isnan().any(-1).tolist() == [s != 2 for s in range(S)]
        assert not hidden.grad[2, 3].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_reciprocal_is_rounded_once(dtype: torch.dtype) -> None:
    labels, temperature = torch.zeros(1000, dtype=torch.long), (torch.rand(1000, dtype=torch.float64) + 0.3).to(dtype)
    assert torch.equal(inverse_temperature_of(temperature, labels, -100), (1 / temperature.double()).float())


def test_labels_of_another_layout() -> None:
    """[tokens] in the order of the labels' elements, whatever their strides are."""
    labels = torch.arange(S * B).view(B, S).t()
    found = inverse_temperature_of(torch.tensor([1.0, 2, 4, 8, 16]), labels, -100)
    assert torch.equal(found, torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0625]).repeat(S))
    assert found.is_contiguous()


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (torch.ones(S), ValueError, r"broadcasts to the labels' shape \(9, 5\), got \(9,\)"),
        (torch.ones(2, S, B), ValueError, "broadcasts to the labels' shape"),
        (torch.ones(1, 1, 1), ValueError, "broadcasts to the labels' shape"),
        (torch.ones(0), ValueError, "broadcasts to the labels' shape"),
        (torch.ones((), requires_grad=True), ValueError, "requires_grad=True"),
        (torch.ones(S, B, dtype=torch.bool), TypeError, "real numbers, got torch.bool"),
        (torch.ones(S, B, dtype=torch.complex64), TypeError, "real numbers, got torch.complex64"),
    ],
)
def test_refusals(temperature: Any, error: type[Exception], message: str) -> None:
    hidden, weight, labels = problem()
    with pytest.raises(error, match=message):
        linear_logprobs(hidden, weight, labels, temperature=temperature)


def test_labels_that_a_longer_temperature_would_stretch() -> None:
    with pytest.raises(ValueError, match="broadcasts to the labels' shape"):
        inverse_temperature_of(torch.ones(4), torch.zeros(1, dtype=torch.long), -100)
