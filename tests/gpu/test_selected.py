"""Log-probs of several tokens and of truncated samplers on the GPU, against the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import (
    linear_logprobs,
    linear_selected_logprobs,
    linear_top_logprobs,
    linear_truncated_logprobs,
    linear_truncation_thresholds,
)
from tests.ops.logprobs_cases import PADDED, TOKENS, VOCAB, case

pytestmark = pytest.mark.gpu
KEPT = torch.stack([torch.randperm(VOCAB, generator=torch.Generator().manual_seed(at))[:7] for at in range(TOKENS)])


def both(run: Any, dtype: torch.dtype, **options: Any) -> list[tuple[list[Tensor], Tensor, Tensor]]:
    """Results, dX and dW on the CPU and on the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        c = case(dtype, device=device)
        fields = [f for f in run(c, device, vocab_parallel=PADDED, **options) if f is not None]
        total = torch.zeros((), device=device)
        for at, field in enumerate(fields):
            if field.requires_grad:
                g = torch.randn(field.shape, generator=torch.Generator().manual_seed(at)).to(device)
                total = total + (field * g).sum()
        total.backward()
        assert c.hidden.grad is not None
        assert c.weight.grad is not None
        found.append(([f.detach().cpu() for f in fields], c.hidden.grad.cpu(), c.weight.grad[:VOCAB].cpu()))
    return found


def selected(c: Any, device: str, **options: Any) -> Any:
    tokens = KEPT.clone()
    tokens[3], tokens[4, 1], tokens[5, 2] = -100, tokens[4, 0], -100
    return linear_selected_logprobs(c.hidden, c.weight, tokens.to(device), **options)


def top(c: Any, device: str, **options: Any) -> Any:
    return linear_top_logprobs(c.hidden, c.weight, 9, mask=(c.labels != -100), **options)


def by_tokens(c: Any, device: str, **options: Any) -> Any:
    return linear_truncated_logprobs(c.hidden, c.weight, c.labels, kept_tokens=KEPT.to(device), **options)


def by_threshold(c: Any, device: str, **options: Any) -> Any:
    parallel = options["vocab_parallel"]
    cut = linear_truncation_thresholds(c.hidden, c.weight, top_k=40, top_p=0.9, min_p=0.001, vocab_parallel=parallel)
    return linear_truncated_logprobs(c.hidden, c.weight, c.labels, min_logprob=cut, **options)


@pytest.mark.parametrize("run", [selected, top, by_tokens, by_threshold])
@pytest.mark.parametrize("grad_precision", ["bf16", "bf16x2", "bf16x3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("invariant", [False, True])
def test_the_gpu_agrees_with_the_cpu(run: Any, dtype: torch.dtype, grad_precision: str, invariant: bool) -> None:
    if invariant and (dtype == torch.float32 or (dtype == torch.float16 and grad_precision != "bf16")):
        pytest.skip("invariant=True refuses these")
    (results, dx, dw), (gpu_results, gpu_dx, gpu_dw) = both(
        run, dtype, grad_precision=grad_precision, invariant=invariant
    )
    for a, b in zip(gpu_results, results, strict=True):
        assert relative_error(a, b) < 3e-6
    bound = {torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert relative_error(gpu_dx, dx) < bound
    assert relative_error(gpu_dw, dw) < bound


@pytest.mark.parametrize("which", ["selected", "tokens", "threshold"])
def test_the_host_does_not_wait(which: str) -> None:
    c, kept, cut = case(device="cuda"), KEPT.cuda(), torch.full((TOKENS,), -6.0, device="cuda")
    runs: dict[str, Callable[[], Any]] = {
        "selected": lambda: linear_selected_logprobs(c.hidden, c.weight, kept),
        "tokens": lambda: linear_truncated_logprobs(c.hidden, c.weight, c.labels, kept_tokens=kept),
        "threshold": lambda: linear_truncated_logprobs(c.hidden, c.weight, c.labels, min_logprob=cut),
    }
    runs[which]().logprobs.sum().backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs[which]().logprobs.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert c.hidden.grad is not None
    assert c.hidden.grad.isfinite().all()
    assert c.hidden.grad.any()


def test_a_large_problem() -> None:
    """A vocabulary in several chunks of tokens, against the one-label operator."""
    torch.manual_seed(0)
    x = torch.randn(3000, 512, device="cuda").bfloat16().requires_grad_()
    w = (torch.randn(151936, 512, device="cuda") / 16).bfloat16().requires_grad_()
    labels = torch.randint(151936, (3000, 1), device="cuda")
    g = torch.randn(3000, device="cuda")
    many = linear_selected_logprobs(x, w, labels)
    (many.logprobs[:, 0] * g).sum().backward()
    dx, dw = x.grad, w.grad
    x.grad = w.grad = None
    one = linear_logprobs(x, w, labels[:, 0])
    (one.logprobs * g).sum().backward()
    torch.testing.assert_close(many.logprobs[:, 0], one.logprobs, rtol=2e-6, atol=2e-6)
    assert relative_error(dx, x.grad.double()) < 1e-3  # type: ignore[union-attr]
    assert relative_error(dw, w.grad.double()) < 1e-3  # type: ignore[union-attr]
