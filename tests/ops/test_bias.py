"""The head without logits with a bias: results and gradients against float64, poison, invariance, ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import (
    LogitsTransform,
    VocabParallel,
    linear_cross_entropy,
    linear_logprobs,
    weighted_cross_entropy,
    workspace,
)
from megatron_fp32.testing.ranks import RankPool
from tests.ops.logprobs_cases import rounded_error, with_main_grad

Pool = Callable[[int], RankPool]
TOKENS, HIDDEN, VOCAB, ROWS = 150, 40, 450, 512
FP32 = 1e-6
BENT = LogitsTransform(scale=1.3, softcap=5.0)


def problem(dtype: torch.dtype, bias_dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN).to(dtype), (torch.randn(ROWS, HIDDEN) / 4).to(dtype)
    bias = (torch.randn(ROWS) * 2).to(bias_dtype or dtype)
    weight[VOCAB:], bias[VOCAB:] = torch.nan, torch.nan
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[3] = -100
    hidden[3] = torch.nan
    g = torch.randn(4, TOKENS)
    g[0, 9] = 0
    return {"hidden": hidden, "weight": weight, "bias": bias, "labels": labels, "g": g}


def leaves(p: dict[str, Tensor], rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return (
        p["hidden"].clone().requires_grad_(),
        p["weight"].chunk(ranks)[rank].clone().requires_grad_(),
        p["bias"].chunk(ranks)[rank].clone().requires_grad_(),
    )


def differentiate(operator: str, p: dict[str, Tensor], x: Tensor, w: Tensor, b: Tensor, **options: Any) -> list[Tensor]:
    """Call the operator, backward with the upstream gradients of the problem; its outputs."""
    options = {"vocab_parallel": VocabParallel(vocab_size=VOCAB), **options}
    if operator == "logprobs":
        out = linear_logprobs(x, w, p["labels"], bias=b, mean_logit=True, top_k=3, **options)
        torch.autograd.backward(out[:4], list(p["g"]))
        return [t.detach() for t in out if t is not None]
    if operator == "loss":
        loss = linear_cross_entropy(x, w, p["labels"], bias=b, label_smoothing=0.1, z_loss=1e-3, **options)
        loss.backward(p["g"][0])
        return [loss.detach()]
    weighted = weighted_cross_entropy(x, w, p["labels"], p["g"][0], bias=b, label_smoothing=0.1, z_loss=1e-3, **options)
    weighted.total.backward()
    return [weighted.losses]


def truth(
    operator: str, p: dict[str, Tensor], transform: LogitsTransform, temperature: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and dX, dW and dbias of the vocabulary, in float64."""
    x, w, b = (t.detach().nan_to_num().double().requires_grad_() for t in (p["hidden"], p["weight"], p["bias"]))
    z = (x @ w[:VOCAB].t() + b[:VOCAB]) * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    z = z / temperature
    ignored, labels = p["labels"] == -100, p["labels"]
    log_p = z.log_softmax(1)
    if operator == "logprobs":
        outputs = [
            log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0], torch.special.entr(log_p.exp()).sum(1),
            z.logsumexp(1), z.mean(1),
        ]  # fmt: skip
    else:
        losses = torch.nn.functional.cross_entropy(z, labels, reduction="none", label_smoothing=0.1)
        outputs = [losses + 1e-3 * z.logsumexp(1).square()]
    outputs = [torch.where(ignored, 0.0, t) for t in outputs]
    grads = torch.autograd.grad(sum((a * g).sum() for a, g in zip(outputs, p["g"], strict=False)), (x, w, b))
    outputs = [t.detach() for t in outputs]
    if operator == "logprobs":
        top = log_p.topk(3)
        outputs += [top.values.masked_fill(ignored[:, None], 0), top.indices.masked_fill(ignored[:, None], -1)]
    if operator == "weighted":
        outputs = [outputs[0] * (p["g"][0] != 0)]
    return outputs, [grads[0], grads[1][:VOCAB], grads[2][:VOCAB]]


@pytest.mark.parametrize("options", [{}, {"chunk_size": 64}, {"backward": "saved"}], ids=["plain", "chunks", "saved"])
@pytest.mark.parametrize("transform", [LogitsTransform(), BENT], ids=["straight", "bent"])
@pytest.mark.parametrize(
    ("dtype", "bias_dtype"),
    [
        (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
        (torch.float32, torch.float32),
    ],
)  # fmt: skip
@pytest.mark.parametrize("operator", ["logprobs", "loss", "weighted"])
def test_against_float64(
    operator: str, dtype: torch.dtype, bias_dtype: torch.dtype, transform: LogitsTransform, options: dict[str, Any]
) -> None:
    if operator == "weighted":
        options = {k: v for k, v in options.items() if k != "backward"}
    p = problem(dtype, bias_dtype)
    x, w, b = leaves(p)
    outputs = differentiate(
        operator, p, x, w, b, grad_precision="bf16x3", logits_transform=transform, temperature=0.7, **options
    )
    exact, (dx, dw, db) = truth(operator, p, transform, 0.7)
    for value, expected in zip(outputs, exact, strict=True):
        assert relative_error(value, expected.double()) < FP32
    assert relative_error(x.grad, dx) < 1.05 * rounded_error(dx, dtype) + 2 * FP32
    assert relative_error(w.grad[:VOCAB], dw) < 1.05 * rounded_error(dw, dtype) + 2 * FP32
    assert b.grad.dtype == bias_dtype
    assert relative_error(b.grad[:VOCAB], db) < 1.05 * rounded_error(db, bias_dtype) + 2 * FP32
    assert not b.grad[VOCAB:].any()
    assert not w.grad[VOCAB:].any()
    assert not x.grad[3].any()


@pytest.mark.parametrize("operator", ["logprobs", "loss", "weighted"])
@pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
def test_the_gradient_is_the_sum_of_the_dy_that_dw_sees(operator: str, precision: Any) -> None:
    """A hidden unit of 1 makes its column of dW that sum."""
    p = problem(torch.bfloat16, torch.float32)
    p["hidden"][:, 0] = 1
    x, w, b = leaves(p)
    with_main_grad(w)
    differentiate(operator, p, x, w, b, grad_precision=precision)
    assert relative_error(b.grad, w.main_grad[:, 0].double()) < FP32
    _, (_, _, db) = truth(operator, p, LogitsTransform(), 1.0)
    assert 1e-7 < relative_error(b.grad[:VOCAB], db) < (6e-3 if precision == "bf16" else 3e-5)


@pytest.mark.parametrize("operator", ["logprobs", "loss", "weighted"])
@pytest.mark.parametrize("alone", ["hidden", "weight", "bias"])
def test_one_gradient_alone(operator: str, alone: str) -> None:
    p = problem(torch.float32)
    tensors = dict(zip(("hidden", "weight", "bias"), leaves(p), strict=True))
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == alone)
    differentiate(operator, p, tensors["hidden"], tensors["weight"], tensors["bias"])
    _, exact = truth(operator, p, LogitsTransform(), 1.0)
    for (name, tensor), expected in zip(tensors.items(), exact, strict=True):
        if name == alone:
            assert relative_error(tensor.grad[: len(expected)], expected) < 2 * FP32
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("operator", ["logprobs", "loss", "weighted"])
@pytest.mark.parametrize("transform", [LogitsTransform(), BENT], ids=["straight", "bent"])
def test_chunks_of_columns(operator: str, transform: LogitsTransform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk takes its own part of the bias, and writes its own part of the gradient."""
    monkeypatch.setattr(workspace, "BYTES", 1)
    monkeypatch.setattr(workspace, "GRADIENT_COLUMNS", 128)
    p = problem(torch.bfloat16, torch.float32)
    x, w, b = leaves(p)
    differentiate(operator, p, x, w, b, grad_precision="bf16x2", logits_transform=transform, chunk_size=64)
    _, (dx, dw, db) = truth(operator, p, transform, 1.0)
    assert relative_error(x.grad, dx) < 1.1 * rounded_error(dx, torch.bfloat16)
    assert relative_error(w.grad[:VOCAB], dw) < 1.1 * rounded_error(dw, torch.bfloat16)
    assert relative_error(b.grad[:VOCAB], db) < 3e-5


@pytest.mark.parametrize("operator", ["logprobs", "loss", "weighted"])
def test_invariant(operator: str) -> None:
    """Not a bit changes with the batch."""
    p = problem(torch.bfloat16, torch.float32)
    x, w, b = leaves(p)
    whole = differentiate(operator, p, x, w, b, invariant=True)
    rows = slice(70, 101)
    part = {**p, "hidden": p["hidden"][rows], "labels": p["labels"][rows], "g": p["g"][:, rows]}
    y, w, b = leaves(part)
    for a, c in zip(differentiate(operator, part, y, w, b, invariant=True), whole, strict=True):
        assert torch.equal(a, c[rows])
    assert torch.equal(y.grad, x.grad[rows])


def test_no_tokens() -> None:
    x, w, b = (torch.randn(shape).requires_grad_() for shape in ((0, 8), (20, 8), (20,)))
    linear_logprobs(x, w, torch.zeros(0, dtype=torch.long), bias=b).logprobs.sum().backward()
    assert b.grad.shape == (20,)
    assert not b.grad.any()
    b.grad = None
    weighted_cross_entropy(x, w, torch.zeros(0, dtype=torch.long), torch.zeros(0), bias=b).total.backward()
    assert not b.grad.any()


@pytest.mark.parametrize(
    ("bias", "error", "message"),
    [
        (torch.ones(3), ValueError, r"expected bias \[512\] on cpu, got \(3,\)"),
        (torch.ones(ROWS, 1), ValueError, "expected bias"),
        (torch.ones(ROWS, device="meta"), ValueError, "on cpu, got .* on meta"),
        (torch.ones(ROWS, dtype=torch.float64), TypeError, "bfloat16, float16 or float32 tensor or None, got torch.f"),
        (1.0, TypeError, "got 1.0"),
    ],
)
@pytest.mark.parametrize("operator", ["logprobs", "loss", "weighted"])
def test_refusals(operator: str, bias: Any, error: type[Exception], message: str) -> None:
    p = problem(torch.float32)
    with pytest.raises(error, match=message):
        differentiate(operator, p, p["hidden"], p["weight"], bias)


def on_a_rank(size: int, sequence_parallel: bool, operator: str, invariant: bool) -> list[Tensor]:
    """Outputs, dX, dW and dbias of this rank."""
    p, rank = problem(torch.bfloat16, torch.float32), dist.get_rank()
    p = {**p, "hidden": p["hidden"][:148], "labels": p["labels"][:148], "g": p["g"][:, :148]}
    x, w, b = leaves(p, rank, size)
    if sequence_parallel:
        x = x.detach().chunk(size)[rank].clone().requires_grad_()
    parallel = VocabParallel(group=dist.group.WORLD, vocab_size=VOCAB, sequence_parallel=sequence_parallel)
    outputs = differentiate(operator, p, x, w, b, vocab_parallel=parallel, invariant=invariant, grad_precision="bf16x2")
    return [*outputs, x.grad, w.grad, b.grad]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one(ranks: Pool, size: int, sequence_parallel: bool) -> None:
    for operator, invariant in (("logprobs", False), ("logprobs", True), ("loss", True), ("weighted", True)):
        p = problem(torch.bfloat16, torch.float32)
        p = {**p, "hidden": p["hidden"][:148], "labels": p["labels"][:148], "g": p["g"][:, :148]}
        x, w, b = leaves(p)
        alone = differentiate(operator, p, x, w, b, invariant=invariant, grad_precision="bf16x2")
        answers = ranks(size).run(on_a_rank, size, sequence_parallel, operator, invariant)
        dx = torch.cat([a[-3] for a in answers]) if sequence_parallel else answers[0][-3]
        dw, db = (torch.cat([a[i] for a in answers]) for i in (-2, -1))
        if invariant:
            assert all(torch.equal(a, c) for a, c in zip(answers[0][:-3], alone, strict=True))
            assert torch.equal(dx, x.grad)
        for a, c in zip(answers[0][:-3], alone, strict=True):
            assert relative_error(a, c.double()) < 2e-6
        assert relative_error(dx, x.grad.double()) < 1e-3
        assert relative_error(dw, w.grad.double()) < 1e-3
        assert relative_error(db, b.grad.double()) < 2e-6
