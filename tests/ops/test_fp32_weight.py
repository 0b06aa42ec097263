"""A weight in float32 beside bfloat16 hidden states: nothing of the weight is rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.autograd import DeferredWeightGrad
from megatron_fp32.ops.logits.reference import gradients_reference, relative_error
from megatron_fp32.ops.logprobs import VocabParallel, linear_cross_entropy, linear_logprobs, weighted_cross_entropy
from megatron_fp32.ops.products import forward, hidden_grad
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.hidden_grad import ChunkedHiddenSum
from megatron_fp32.ops.products.operands import check_operands
from megatron_fp32.ops.products.split import split
from megatron_fp32.testing.ranks import RankPool
from tests.ops.live_bytes import LiveBytes
from tests.ops.logprobs_cases import rounded_error, with_main_grad

Pool = Callable[[int], RankPool]
TOKENS, HIDDEN, VOCAB, ROWS = 148, 96, 450, 512
FP32 = 1e-6
PADDED = VocabParallel(vocab_size=VOCAB)


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of the weight in a small problem."""
    for module in (forward, hidden_grad):
        monkeypatch.setattr(module, "CHUNK", 128)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a weight whose rows need all of their bits, labels and upstream gradients."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(ROWS, HIDDEN) / 4
    weight[VOCAB:] = torch.nan
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[3] = -100
    hidden[3] = torch.nan
    return hidden, weight, labels, torch.randn(TOKENS)


def truth(losses: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (or losses), dX and dW of the vocabulary, in float64."""
    hidden, weight, labels, g = problem()
    x, w = hidden.nan_to_num().double().requires_grad_(), weight[:VOCAB].double().requires_grad_()
    out = -torch.nn.functional.cross_entropy(x @ w.t(), labels, reduction="none")
    out = -out if losses else out
    grads = torch.autograd.grad((out * g).sum(), (x, w))
    return out.detach(), *grads


@pytest.mark.parametrize("exponents", [(0, 1), (-60, 60), (-100, -90)], ids=str)
@pytest.mark.parametrize("fixed", [True, False], ids=["chunks", "whole"])
def test_logits_to_the_level_of_the_accumulator(
    exponents: tuple[int, int], fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of every size, each element with 24 bits."""
    if fixed:
        cut_small(monkeypatch)
    hidden = torch.randn(70, HIDDEN).bfloat16()
    weight = torch.randn(300, HIDDEN) * 2.0 ** torch.randint(*exponents, (300, 1))
    found = logits_product(hidden, weight)
    exact = hidden.double() @ weight.double().t()
    terms = hidden.double().abs() @ weight.double().abs().t()
    assert ((found - exact).abs() / terms).max() < 2.0**-21
    assert relative_error(found / terms, exact / terms) < 2.0**-22
    # Two pieces would not do, and torch's own product in float32 is no better.
    torchs = relative_error((hidden.float() @ weight.t()) / terms, exact / terms)
    assert relative_error(found / terms, exact / terms) < 3 * torchs + 2.0**-26


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("valid", [300, 290, 5, 0])
@pytest.mark.parametrize("largest", [150, 300])
def test_dx_of_the_pieces_that_dy_has(count: int, valid: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, before it is rounded to the hidden states' dtype; what lies in the padding does not matter."""
    cut_small(monkeypatch)
    weight, grad = torch.randn(300, HIDDEN), torch.randn(70, 300)
    weight[valid:], grad[:, valid:] = torch.nan, 0
    out = torch.full((70, HIDDEN), torch.nan)
    total = ChunkedHiddenSum(out, valid=valid)
    pieces = split(grad, count, torch.bfloat16).parts
    for columns in total.chunks(300, largest):
        part = split(grad[:, columns], count, torch.bfloat16)
        total.add(columns, part, weight[columns])
    exact = sum(p.double() for p in pieces) @ weight.nan_to_num().double()
    assert relative_error(out, exact) < 3e-7


@pytest.mark.parametrize("precision", ["bf16", "bf16x2", "bf16x3"])
@pytest.mark.parametrize("traced", [False, True], ids=["eager", "compiled"])
def test_gradients_of_logits(precision: Any, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_small(monkeypatch)
    hidden, weight = problem()[0].nan_to_num().requires_grad_(), problem()[1].nan_to_num().requires_grad_()
    bias, g = torch.randn(ROWS, requires_grad=True), torch.randn(TOKENS, ROWS)

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return fp32_logits(x, w, b, grad_precision=precision)

    if traced:
        torch._dynamo.reset()
    logits = (torch.compile(call, backend="aot_eager") if traced else call)(hidden, weight, bias)
    logits.backward(g)
    exact = gradients_reference(hidden.detach(), weight.detach(), g, bias.detach())
    assert relative_error(logits.detach(), exact.logits) < FP32
    bound = {"bf16": 3e-3, "bf16x2": 1e-5, "bf16x3": FP32}[precision]
    assert hidden.grad.dtype == torch.bfloat16
    assert relative_error(hidden.grad, exact.hidden_grad) < rounded_error(exact.hidden_grad, torch.bfloat16) + bound
    assert weight.grad.dtype == torch.float32
    assert relative_error(weight.grad, exact.weight_grad) < bound
    assert relative_error(bias.grad, exact.bias_grad) < FP32


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 64}, {"backward": "saved"}], ids=str)
@pytest.mark.parametrize("operator", ["logprobs", "loss", "weighted"])
def test_without_logits_against_float64(
    operator: str, options: dict[str, Any], main_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    hidden, weight, labels, g = problem()
    x, w = hidden.requires_grad_(), weight.requires_grad_()
    if main_grad:
        with_main_grad(w)
    options = {"vocab_parallel": PADDED, "grad_precision": "bf16x3", **options}
    if operator == "logprobs":
        out = linear_logprobs(x, w, labels, top_k=2, **options)
        out.logprobs.backward(g)
        values = out.logprobs.detach()
    elif operator == "loss":
        values = linear_cross_entropy(x, w, labels, **options)
        values.backward(g)
        values = values.detach()
    else:
        options.pop("backward", None)
        weighted = weighted_cross_entropy(x, w, labels, g, **options)
        weighted.total.backward()
        values = weighted.losses
    exact, dx, dw = truth(operator != "logprobs")
    assert relative_error(values, exact) < FP32
    assert relative_error(x.grad, dx) < 1.02 * rounded_error(dx, torch.bfloat16)
    found = w.main_grad if main_grad else w.grad
    assert found.dtype == torch.float32
    assert relative_error(found[:VOCAB], dw) < 2 * FP32
    assert not found[VOCAB:].any()
    assert not x.grad[3].any()


def test_no_second_copy_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the pieces of one chunk of rows: 6 bytes for each of their elements."""
    cut_small(monkeypatch)
    rows, hidden_size = 128 * 80, 2048
    hidden, weight = torch.randn(4, hidden_size).bfloat16(), torch.randn(rows, hidden_size)
    hidden.requires_grad_()
    with LiveBytes() as meter:
        fp32_logits(hidden, weight).sum().backward()
        linear_cross_entropy(hidden, weight, torch.zeros(4, dtype=torch.long), reduction="sum").backward()
    # On the CPU also a piece that is widened for its product, and the products of 64 tokens.
    assert meter.peak < 0.2 * weight.nbytes


def test_what_is_refused() -> None:
    hidden, weight, labels, g = problem()
    for operator in (
        lambda x: fp32_logits(x, weight),
        lambda x: linear_logprobs(x, weight, labels),
        lambda x: linear_cross_entropy(x, weight, labels),
        lambda x: weighted_cross_entropy(x, weight, labels, g),
    ):
        with pytest.raises(TypeError, match="or weight float32 beside bfloat16, got"):
            operator(hidden.half())
    with pytest.raises(ValueError, match="invariant=True cannot be kept here"):
        fp32_logits(hidden, weight, invariant=True)
    with pytest.raises(ValueError, match="invariant=True cannot be kept here"):
        linear_logprobs(hidden, weight, labels, invariant=True)
    weight = with_main_grad(weight.requires_grad_())
    deferred = DeferredWeightGrad(buffer=[], limit=0)
    with pytest.raises(ValueError, match=r"expected hidden states of torch\.float32, got torch\.bfloat16"):
        fp32_logits(hidden, weight, deferred=deferred)


def test_tf32_does_not_touch_pieces() -> None:
    class Fake:
        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype, self.is_cuda = dtype, True

    half: Any = Fake(torch.bfloat16)
    full: Any = Fake(torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        check_operands(half, full, names=("hidden", "weight"))
        with pytest.raises(ValueError, match="TF32 is allowed"):
            check_operands(full, full, names=("hidden", "weight"))
    finally:
        torch.set_float32_matmul_precision(before)


def on_a_rank(size: int, sequence_parallel: bool) -> list[list[Tensor]]:
    """Of each operator: outputs, dX and dW of this rank."""
    hidden, weight, labels, g = problem()
    rank = dist.get_rank()
    hidden = hidden.chunk(size)[rank] if sequence_parallel else hidden
    group = dist.group.WORLD
    options: dict[str, Any] = {
        "vocab_parallel": VocabParallel(group=group, vocab_size=VOCAB, sequence_parallel=sequence_parallel),
        "grad_precision": "bf16x3",
    }
    found = []
    for operator in ("logits", "loss", "weighted"):
        x, w = hidden.clone().requires_grad_(), weight.chunk(size)[rank].clone().requires_grad_()
        if operator == "logits":
            logits = fp32_logits(
                x.nan_to_num(), w.nan_to_num(), tp_group=group, sequence_parallel=sequence_parallel,
                grad_precision="bf16x3",
            )  # fmt: skip
            logits.backward(torch.ones_like(logits))
            values = logits.detach()
        elif operator == "loss":
            values = linear_cross_entropy(x, w, labels, **options)
            values.backward(g)
            values = values.detach()
        else:
            weighted = weighted_cross_entropy(x, w, labels, g, **options)
            weighted.total.backward()
            values = weighted.losses
        found.append([values, x.grad, w.grad])
    return found


@pytest.mark.parametrize(("size", "sequence_parallel"), [(2, False), (2, True), (4, True)])
def test_ranks(ranks: Pool, size: int, sequence_parallel: bool) -> None:
    answers = ranks(size).run(on_a_rank, size, sequence_parallel)
    hidden, weight, _, _ = problem()
    reference = gradients_reference(hidden.nan_to_num(), weight.nan_to_num(), torch.ones(TOKENS, ROWS))
    losses, dx, dw = truth(True)
    for index in range(3):
        parts = [a[index] for a in answers]
        found_dx = torch.cat([p[1] for p in parts]) if sequence_parallel else parts[0][1]
        found_dw = torch.cat([p[2] for p in parts])[:VOCAB]
        if index == 0:
            assert relative_error(torch.cat([p[0] for p in parts], 1), reference.logits) < FP32
            expected_dx = torch.where(hidden.isnan(), 0.0, reference.hidden_grad)
            assert relative_error(found_dx, expected_dx) < 1.02 * rounded_error(expected_dx, torch.bfloat16)
            assert relative_error(found_dw, reference.weight_grad[:VOCAB]) < 2 * FP32
            continue
        for p in parts:
            assert relative_error(p[0], losses) < FP32
        assert relative_error(found_dx, dx) < 1.02 * rounded_error(dx, torch.bfloat16)
        assert relative_error(found_dw, dw) < 2 * FP32
