"""Distillation without logits on CUDA: float64, small divergences, the kernels' definitions, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import LogitsTransform, VocabParallel
from megatron_fp32.ops.logprobs.distillation import linear_distillation
from megatron_fp32.ops.logprobs.distillation_forward import block_sums
from megatron_fp32.ops.logprobs.divergence import Pair, sums_torch
from megatron_fp32.ops.logprobs.divergence_gradient import divergence_gradient, gradient_torch
from tests.ops.distillation_cases import DIVERGENCES, ROWS, TOKENS, VOCAB, case, close_case
from tests.ops.logprobs_cases import rounded_error, softmax, with_main_grad

pytestmark = pytest.mark.gpu

PADDED = VocabParallel(vocab_size=VOCAB)
# A truncating accumulator over 96 terms, then exponentials of an error of 2^-22.
FP32 = 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    for chunk_size in (None, 24):
        c = case(dtype, device="cuda")
        upstream = torch.randn(2, TOKENS, device="cuda")
        with torch.no_grad():
            c.hidden[3], c.weight[VOCAB:], c.teacher_weight[VOCAB:] = 1.0, math.nan, math.nan
        operator = {"logits_transform": LogitsTransform(softcap=9.0), "temperature": 0.8, "label_temperature": 1.2}
        out = c.run(
            DIVERGENCES[name], labels=c.labels, vocab_parallel=PADDED, grad_precision="bf16x3", chunk_size=chunk_size,
            **operator,
        )  # fmt: skip
        torch.autograd.backward(out[:2], list(upstream))
        expected, dx, dw = c.truth(
            DIVERGENCES[name], *upstream, temperature=0.8, label_temperature=1.2, student=(1.0, 9.0)
        )
        for field, value, exact in zip(out._fields, out, expected, strict=True):
            assert value is not None
            assert relative_error(value.detach(), exact) < FP32, field
        assert relative_error(c.hidden.grad, dx) < 1.05 * rounded_error(dx, dtype) + 3 * FP32
        assert relative_error(c.weight.grad, dw) < 1.05 * rounded_error(dw, dtype) + 3 * FP32


@pytest.mark.parametrize("step", [6, 9, 13])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_small_divergence_keeps_its_digits(name: str, step: int) -> None:
    """The products are exact on a GPU, too."""
    c, upstream = close_case(step, device="cuda"), torch.randn(40, device="cuda")
    out = c.run(DIVERGENCES[name])
    out.divergence.backward(upstream)
    expected, dx, dw = c.truth(DIVERGENCES[name], upstream)
    assert ((out.divergence.detach() / expected.divergence) - 1).abs().max() < 1e-5
    assert relative_error(c.hidden.grad, dx) < 5e-6
    assert relative_error(c.weight.grad, dw) < 5e-6


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_kernels(name: str, capped: bool) -> None:
    """Against the definitions in torch, on the same device."""
    part = softmax(VOCAB, scale=1.1, softcap=5.0 if capped else None)
    pair = Pair(student=part, teacher=part, divergence=DIVERGENCES[name])
    raw, teacher_raw = torch.randn(2, TOKENS, ROWS, device="cuda") * 4
    inverse = torch.rand(TOKENS, device="cuda") + 0.5
    rows = []
    for each in (raw, teacher_raw):
        z = part.logits(each, inverse)[:, :VOCAB]
        rows += [z.amax(1), (z - z.amax(1, keepdim=True)).double().exp().sum(1).log().float()]
    shift = rows[3] - rows[1]
    vectors = torch.stack([rows[0], rows[1], inverse, rows[2], rows[3], shift])
    got, expected = block_sums(raw, teacher_raw, vectors, pair), sums_torch(raw, teacher_raw, vectors, pair)
    for field in range(expected.shape[1]):
        assert relative_error(got[:, field], expected[:, field].double()) < 1e-5
    g = torch.randn(11, TOKENS, device="cuda")
    every = torch.cat([vectors, g * torch.tensor([1e-7, *[1.0] * 10], device="cuda")[:, None]])
    every[12:15] = vectors[:3]
    labels = torch.randint(VOCAB, (TOKENS,), device="cuda").int()
    for count in (1, 2, 3):
        options: dict[str, Any] = {"first": 128, "count": count, "dtype": torch.bfloat16, "scale": None}
        a = divergence_gradient(raw[:, 128:500], teacher_raw[:, 128:500], every, labels, pair, **options).parts
        b = gradient_torch(
            raw[:, 128:500], teacher_raw[:, 128:500], every, labels, pair, 128, count, torch.bfloat16, None
        )
        total, exact = (torch.stack(list(pieces)).double().sum(0) for pieces in (a, b))
        assert relative_error(total, exact) < 2.0 ** (-8 * count) + 1e-5


def test_a_token_that_does_not_count_touches_nothing() -> None:
    results = []
    for poison in (1.0, math.nan):
        c = case(torch.bfloat16, device="cuda")
        with torch.no_grad():
            c.hidden[3], c.teacher_hidden[3] = poison, poison
        out = c.run(DIVERGENCES["all"], labels=c.labels, vocab_parallel=PADDED, grad_precision="bf16x2")
        assert out.logprobs is not None
        (out.divergence - out.logprobs).sum().backward()
        results.append((*out, c.hidden.grad, c.weight.grad))
        assert not c.hidden.grad[3].any()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_host_does_not_wait_for_the_device() -> None:
    c = case(torch.bfloat16, device="cuda")
    mask = c.labels != -100
    c.run(DIVERGENCES["all"], labels=c.labels, mask=mask, vocab_parallel=PADDED).divergence.sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        c.run(DIVERGENCES["all"], labels=c.labels, mask=mask, vocab_parallel=PADDED).divergence.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert c.hidden.grad is not None
    assert c.hidden.grad.isfinite().all()
    assert c.hidden.grad.any()


@pytest.mark.parametrize("precision", ["bf16", "bf16x2", "bf16x3"])
def test_memory(precision: Any) -> None:
    """At T=8192 and V=151936 the logits of both would take 9.3 GiB."""
    torch.manual_seed(0)
    x = torch.randn(8192, 4096, device="cuda").bfloat16().requires_grad_()
    t = torch.randn(8192, 5120, device="cuda").bfloat16()
    w = with_main_grad((torch.randn(151936, 4096, device="cuda") / 64).bfloat16().requires_grad_())
    u = (torch.randn(151936, 5120, device="cuda") / 64).bfloat16()
    torch.mm(t[:64], t[:64].t(), out_dtype=torch.float32)  # cuBLAS' workspace belongs to the process
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = linear_distillation(x, w, t, u, divergence=DIVERGENCES["all"], grad_precision=precision)
    out.divergence.sum().backward()
    # A chunk, dX of all tokens in fp32 and in bf16, and autograd's dummy of dW.
    assert (torch.cuda.max_memory_allocated() - before) / 2**30 < 1.5
