"""Options of the head without logits on CUDA: temperatures, reductions, ignored labels, metrics, bias, fp32 weight."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import gradients_reference, relative_error
from megatron_fp32.ops.logprobs import (
    VocabParallel,
    linear_cross_entropy,
    linear_logprobs,
    weighted_cross_entropy,
    workspace,
)
from megatron_fp32.ops.products import forward, hidden_grad
from megatron_fp32.ops.products.forward import logits_product
from tests.ops.logprobs_cases import rounded_error

pytestmark = pytest.mark.gpu

S, B, HIDDEN, VOCAB, ROWS = 75, 4, 96, 650, 768
PADDED = VocabParallel(vocab_size=VOCAB)
FP32 = 3e-6


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def problem(weight_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(S, B, HIDDEN).bfloat16(), (torch.randn(ROWS, HIDDEN) / 4).to(weight_dtype)
    bias, labels = torch.randn(ROWS) * 2, torch.randint(VOCAB, (S, B))
    weight[VOCAB:], bias[VOCAB:] = torch.nan, torch.nan
    labels[labels == 0], labels[3, 1], hidden[3, 1] = 7, 0, torch.nan
    temperature, g = torch.rand(B) + 0.5, torch.rand(S, B)
    found = {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, "temperature": temperature, "g": g}
    return {name: tensor.cuda() for name, tensor in found.items()}


def truth(p: dict[str, Tensor], bias: bool) -> tuple[Tensor, list[Tensor]]:
    """Losses [s, b], and the gradients of `(losses * g).sum()`: dX, dW, dbias of the vocabulary, in float64."""
    x, w, b = (t.detach().nan_to_num().double().requires_grad_() for t in (p["hidden"], p["weight"], p["bias"]))
    z = x @ w[:VOCAB].t() + (b[:VOCAB] if bias else 0 * b[:VOCAB])
    z = (z / p["temperature"].double()[:, None]).flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(z, p["labels"].flatten(), ignore_index=0, reduction="none").view(S, B)
    grads = torch.autograd.grad((losses * p["g"]).sum(), (x, w, b))
    return losses.detach(), [grads[0], grads[1][:VOCAB], grads[2][:VOCAB]]


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("operator", ["recompute", "saved", "weighted"])
@pytest.mark.parametrize("small", [False, True])
def test_against_float64_without_waiting(
    operator: Any, bias: bool, weight_dtype: torch.dtype, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        for module in (forward, hidden_grad):
            monkeypatch.setattr(module, "CHUNK", 128)
        monkeypatch.setattr(workspace, "BYTES", 4 * ROWS * 64)
        monkeypatch.setattr(workspace, "GRADIENT_COLUMNS", 128)
    p = problem(weight_dtype)
    exact, grads = truth(p, bias)
    x, w, b = (p[name].clone().requires_grad_() for name in ("hidden", "weight", "bias"))
    options: dict[str, Any] = {
        "bias": b if bias else None, "temperature": p["temperature"], "ignore_index": 0, "vocab_parallel": PADDED,
        "grad_precision": "bf16x3",
    }  # fmt: skip
    for waiting in (contextlib.nullcontext(), no_waiting()):
        # The first call compiles kernels.
        x.grad = w.grad = b.grad = None
        with waiting:
            if operator == "weighted":
                out = weighted_cross_entropy(x, w, p["labels"], p["g"], **options)
                losses = out.losses
            else:
                losses = linear_cross_entropy(x, w, p["labels"], backward=operator, **options)
                losses.backward(p["g"])
        if operator == "weighted":
            out.total.backward()
    assert relative_error(losses.detach(), exact) < FP32
    assert losses[3, 1] == 0
    for name, found, expected in zip(("dX", "dW", "dbias"), (x.grad, w.grad, b.grad), grads, strict=True):
        if name == "dbias" and not bias:
            continue
        found = found[:VOCAB] if name != "dX" else found
        bound = 1.05 * rounded_error(expected, found.dtype) + 2 * FP32
        assert relative_error(found, expected) < bound, name
    assert not x.grad[3, 1].any()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions_and_metrics_without_waiting(reduction: Any) -> None:
    p = problem()
    each = linear_cross_entropy(p["hidden"], p["weight"], p["labels"], ignore_index=0, vocab_parallel=PADDED)
    x = p["hidden"].clone().requires_grad_()
    temperature = torch.ones(())  # on the host
    with no_waiting():
        out = linear_cross_entropy(
            x, p["weight"], p["labels"], ignore_index=0, vocab_parallel=PADDED, temperature=temperature,
            reduction=reduction, with_metrics=True, z_loss=0.0,
        )  # fmt: skip
        out.loss.backward()
    count = S * B - 1 if reduction == "mean" else 1
    assert out.loss == (each.double().sum() / count).float()
    logits = p["hidden"].float() @ p["weight"].float().t()[:, :VOCAB]
    own = logits.gather(2, p["labels"][..., None])[..., 0]
    sure = (own - logits.topk(2).values[..., 0]).abs() > 1e-3
    expected = own >= logits.amax(-1)
    valid = p["labels"] != 0
    assert torch.equal((out.correct & valid)[sure | expected], (expected & valid)[sure | expected])
    assert not out.correct[3, 1]


def test_invariant_with_a_bias() -> None:
    p = problem()
    options: dict[str, Any] = {"bias": p["bias"], "invariant": True, "vocab_parallel": PADDED}
    whole = linear_logprobs(p["hidden"], p["weight"], p["labels"], **options).logprobs
    for rows in (slice(0, 1), slice(40, 75)):
        part = linear_logprobs(p["hidden"][rows], p["weight"], p["labels"][rows], **options).logprobs
        assert torch.equal(part.nan_to_num(nan=1), whole[rows].nan_to_num(nan=1))


def test_logits_of_an_fp32_weight() -> None:
    """To the level of an accumulator that a tensor core truncates, and no second copy of the weight."""
    hidden = torch.randn(256, 1024, device="cuda").bfloat16()
    weight = torch.randn(20000, 1024, device="cuda")
    found = logits_product(hidden, weight)
    exact, terms = hidden.double() @ weight.double().t(), hidden.double().abs() @ weight.double().abs().t()
    assert ((found - exact).abs() / terms).max() < 2.0**-20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    again = logits_product(hidden, weight)
    peak = torch.cuda.max_memory_allocated() - before - again.nbytes
    assert peak < 2.1 * 6 * 8192 * 1024
    assert torch.equal(again, found)


def test_gradients_of_logits_of_an_fp32_weight() -> None:
    hidden = torch.randn(64, 96, device="cuda").bfloat16().requires_grad_()
    weight, g = torch.randn(700, 96, device="cuda").requires_grad_(), torch.randn(64, 700, device="cuda")
    fp32_logits(hidden, weight, grad_precision="bf16x3").backward(g)
    exact = gradients_reference(hidden.detach(), weight.detach(), g)
    bound = rounded_error(exact.hidden_grad, torch.bfloat16)
    assert relative_error(hidden.grad, exact.hidden_grad) < 1.02 * bound
    assert relative_error(weight.grad, exact.weight_grad) < FP32
