"""The backward products by chunks of the vocabulary and of the tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import gradients_reference, relative_error
from megatron_fp32.ops.products import backward, weight_grad
from megatron_fp32.ops.products.chunks import even_chunks
from megatron_fp32.ops.products.grad_precision import GradPrecision

HIDDEN = 16


def cut_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks of a small problem."""
    for module in (backward, weight_grad):
        monkeypatch.setattr(module, "CHUNK", 128)
    monkeypatch.setattr(backward, "UNSPLIT_CHUNK", 256)


@given(st.integers(0, 5000), st.integers(1, 3000))
def test_chunks_cover_everything_once(length: int, size: int) -> None:
    chunks = even_chunks(length, size)
    ends = [0, *(c.stop for c in chunks)]
    assert [c.start for c in chunks] == ends[:-1]
    assert ends[-1] == length
    assert all(0 < c.stop - c.start <= size for c in chunks)
    # Multiples of 128, so that cuBLAS finds its fast path.
    assert size < 128 or all((c.stop - c.start) % 128 == 0 for c in chunks[:-1])
    # Nearly equal: there are no more chunks than multiples of 128 make necessary.
    assert len(chunks) <= -(-length // (size // 128 * 128 or size))


@pytest.mark.parametrize("precision", ["bf16", "bf16x2", "bf16x3"])
@pytest.mark.parametrize("main_grad", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("vocab", [128, 129, 700])
def test_integers_are_exact_in_every_chunk(
    precision: GradPrecision, main_grad: torch.dtype | None, vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_small(monkeypatch)
    hidden = torch.randint(-1, 2, (150, 2, HIDDEN)).bfloat16().requires_grad_()
    weight: Any = torch.randint(-1, 2, (vocab, HIDDEN)).bfloat16().requires_grad_()
    if main_grad is not None:
        weight.main_grad = torch.ones(vocab, HIDDEN, dtype=main_grad)
        weight.grad_added_to_main_grad = False
    grad = torch.randint(-1, 2, (150, 2, vocab)).float()
    fp32_logits(hidden, weight, grad_precision=precision).backward(grad)
    truth = gradients_reference(hidden.detach(), weight.detach(), grad)
    assert truth.weight_grad.abs().max() < 255  # so bf16 holds it
    assert torch.equal(hidden.grad, truth.hidden_grad.bfloat16())
    if main_grad is None:
        assert torch.equal(weight.grad, truth.weight_grad.bfloat16())
    else:
        assert torch.equal(weight.main_grad, (truth.weight_grad + 1).to(main_grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("precision", "bits"), [("bf16x2", 15), ("bf16x3", 20)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-9])
def test_split_gradients_keep_their_bits(
    dtype: torch.dtype, precision: Any, bits: int, magnitude: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-9 is what a gradient over a long batch looks like without a loss scale; it is zero in float16."""
    cut_small(monkeypatch)
    hidden = torch.randn(200, HIDDEN, requires_grad=True)
    weight: Any = torch.randn(700, HIDDEN).to(dtype).requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros(700, HIDDEN), False
    grad = torch.randn(200, 700) * magnitude
    fp32_logits(hidden, weight, grad_precision=precision).backward(grad)
    truth = gradients_reference(hidden.detach(), weight.detach(), grad)
    assert relative_error(hidden.grad, truth.hidden_grad) < 2.0**-bits
    assert relative_error(weight.main_grad, truth.weight_grad) < 2.0**-bits


@pytest.mark.parametrize("precision", ["bf16x2", "bf16x3"])
def test_a_gradient_that_is_not_finite_stays_that(precision: GradPrecision) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        hidden = torch.randn(4, HIDDEN).to(dtype).requires_grad_()
        weight = torch.randn(40, HIDDEN).to(dtype).requires_grad_()
        grad = torch.randn(4, 40)
        grad[1, 3] = float("inf")
        fp32_logits(hidden, weight, grad_precision=precision).backward(grad)
        assert not hidden.grad[1].isfinite().any()
        assert hidden.grad[0].isfinite().all()
        assert not weight.grad[3].isfinite().any()
