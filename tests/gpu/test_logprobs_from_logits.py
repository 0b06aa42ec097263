"""Stored logits on CUDA: against float64, in the place of the logits, without fp32 copies, without waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_fp32 import VocabParallel
from megatron_fp32.integrations import nemo_rl
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import logprobs_from_logits
from tests.ops.test_logprobs_from_logits import LAYOUTS, SHAPE, VOCAB, problem, run, truth

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_results_and_gradient(dtype: torch.dtype, layout: str, chunk_size: int | None) -> None:
    logits, labels, temperature = (x.cuda() for x in problem(dtype))
    logits = LAYOUTS[layout](logits)
    upstream = [torch.randn(SHAPE, device="cuda") for _ in range(3)]
    expected, exact = truth(logits, labels, temperature, upstream)
    outputs, grad = run(
        logits, labels, upstream, temperature=temperature, chunk_size=chunk_size,
        vocab_parallel=VocabParallel(vocab_size=VOCAB),
    )  # fmt: skip
    for got, wanted in zip(outputs, expected, strict=True):
        assert relative_error(got, wanted) < 2e-6
    assert (grad[..., VOCAB:] == 0).all()
    assert relative_error(grad, exact) < 1.001 * relative_error(exact.to(dtype), exact) + 2e-6


@DTYPES
def test_the_gradient_takes_the_place_of_the_logits(dtype: torch.dtype) -> None:
    """An odd number of columns, so that rows have every alignment."""
    logits = (torch.randn(300, 5001, device="cuda") * 4).to(dtype)
    labels, upstream = torch.randint(5001, (300,), device="cuda"), [torch.randn(300, device="cuda") for _ in range(3)]
    _, expected = run(logits, labels, upstream)
    used = logits.clone().requires_grad_() * 1
    out = logprobs_from_logits(used, labels, inplace_backward=True, chunk_size=128)
    (grad,) = torch.autograd.grad(list(out[:3]), used, upstream, retain_graph=True)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == used.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(list(out[:3]), upstream)


def test_memory() -> None:
    """256 MB of bf16 logits: their gradient, and for the statistics little; in their place nothing at all."""
    leaf = torch.randn(4096, 32768, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(32768, (4096,), device="cuda")
    for inplace, gradients in ((False, 1), (True, 0)):
        used = leaf * 1
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = logprobs_from_logits(used, labels, inplace_backward=inplace)
        torch.autograd.grad(out.logprobs.sum(), used)
        more = torch.cuda.max_memory_allocated() - before
        assert more < gradients * used.numel() * 2 + 64 * 2**20


def test_the_host_does_not_wait() -> None:
    logits = torch.randn(1, 64, 1000, device="cuda", requires_grad=True)
    tokens, cu = torch.randint(1000, (1, 64), device="cuda"), torch.tensor([0, 10, 10, 64], device="cuda")
    call = nemo_rl.from_parallel_logits_to_logprobs_packed_sequences
    arguments: tuple[Any, ...] = (tokens, cu, 64, 0, 1000, None)
    call(logits, *arguments).sum().backward()  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(logits, *arguments).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.any()
