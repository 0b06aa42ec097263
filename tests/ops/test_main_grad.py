"""Megatron's protocol for a weight whose gradient is accumulated in `main_grad`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import gradients_reference, relative_error

HIDDEN, VOCAB, TOKENS = 64, 104, (12, 2)


def megatron_weight(main_grad_dtype: torch.dtype | None = torch.float32, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A Parameter as DistributedDataParallel leaves it; `main_grad` holds something already."""
    weight: Any = torch.nn.Parameter((torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).to(dtype))
    weight.grad_added_to_main_grad = False
    if main_grad_dtype is not None:
        weight.main_grad = torch.randint(-8, 9, (VOCAB, HIDDEN)).to(main_grad_dtype)
    return weight


def micro_batch(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return torch.randn(*TOKENS, HIDDEN).to(dtype), torch.randn(*TOKENS, VOCAB)


def backward(hidden: Tensor, weight: Any, grad: Tensor) -> Tensor:
    """One pass; what was returned to autograd for the weight."""
    (returned,) = torch.autograd.grad(fp32_logits(hidden, weight), weight, grad)
    return returned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_main_grad_accumulates_in_fp32(dtype: torch.dtype) -> None:
    weight = megatron_weight(dtype=dtype)
    truth, buffer = weight.main_grad.double(), weight.main_grad
    in_fp32 = weight.main_grad.clone()
    for _ in range(4):
        hidden, grad = micro_batch(dtype)
        backward(hidden, weight, grad)
        rounded = grad.to(dtype)  # once, as the contract says; nothing else may be lost
        truth += gradients_reference(hidden, weight, rounded).weight_grad
        in_fp32 += rounded.float().reshape(-1, VOCAB).t() @ hidden.float().reshape(-1, HIDDEN)
    assert weight.main_grad is buffer
    assert relative_error(weight.main_grad, truth) <= 2 * relative_error(in_fp32, truth)


def test_bf16_main_grad_is_rounded_only_when_it_is_added_to() -> None:
    weight = megatron_weight(torch.bfloat16)
    truth, stock = weight.main_grad.double(), weight.main_grad.clone()
    for _ in range(4):
        hidden, grad = micro_batch()
        backward(hidden, weight, grad)
        truth += gradients_reference(hidden, weight, grad).weight_grad
        stock += grad.bfloat16().reshape(-1, VOCAB).t() @ hidden.reshape(-1, HIDDEN)
    assert weight.main_grad.dtype == torch.bfloat16
    assert relative_error(weight.main_grad, truth) <= 1.1 * relative_error(stock, truth)


@pytest.mark.parametrize("main_grad_dtype", [torch.float32, torch.bfloat16])
def test_the_weight_says_that_its_gradient_was_added(main_grad_dtype: torch.dtype) -> None:
    weight = megatron_weight(main_grad_dtype)
    backward(micro_batch()[0], weight, micro_batch()[1])
    assert weight.grad_added_to_main_grad is True


@pytest.mark.parametrize("main_grad_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("zero_out", [None, False, True])
def test_the_dummy_gradient_is_zero_exactly_when_asked(main_grad_dtype: torch.dtype, zero_out: bool | None) -> None:
    weight = megatron_weight(main_grad_dtype)
    if zero_out is not None:
        weight.zero_out_wgrad = zero_out
    hidden, grad = micro_batch()
    dummy = backward(hidden, weight, grad)
    assert dummy.shape == weight.shape
    assert dummy.dtype == weight.dtype
    # Fresh memory is full of NaN in these tests: nobody spent time on filling it.
    assert not dummy.any() if zero_out else dummy.isnan().all()


def test_a_tied_weight_used_twice_is_added_twice() -> None:
    weight = megatron_weight()
    truth = weight.main_grad.double()
    batches = [(torch.randint(-4, 5, (3, HIDDEN)).bfloat16(), torch.randint(-4, 5, (3, VOCAB)).float()) for _ in "ab"]
    torch.autograd.backward([fp32_logits(h, weight) for h, _ in batches], [g for _, g in batches])
    for hidden, grad in batches:
        truth += gradients_reference(hidden, weight, grad).weight_grad
    assert torch.equal(weight.main_grad.double(), truth)


def test_zero_tokens_leave_main_grad_alone() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = megatron_weight(dtype)
        before = weight.main_grad.clone()
        backward(torch.zeros(0, 2, HIDDEN).bfloat16(), weight, torch.zeros(0, 2, VOCAB))
        assert torch.equal(weight.main_grad, before)
        assert weight.grad_added_to_main_grad


def test_main_grad_is_found_when_saved_tensors_are_copies() -> None:
    weight = megatron_weight()
    before, (hidden, grad) = weight.main_grad.clone(), micro_batch()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        logits = fp32_logits(hidden, weight)
    logits.backward(grad)
    assert weight.grad_added_to_main_grad
    assert not torch.equal(weight.main_grad, before)


def test_main_grad_may_be_another_buffer_by_the_time_of_the_backward_pass() -> None:
    weight = megatron_weight()
    old, new = weight.main_grad, torch.zeros(VOCAB, HIDDEN)
    before, (hidden, grad) = old.clone(), micro_batch()
    logits = fp32_logits(hidden, weight)
    weight.main_grad = new
    logits.backward(grad)
    assert torch.equal(old, before)
    assert new.any()


def test_inside_autocast_main_grad_gets_the_same_bits() -> None:
    plain = megatron_weight()
    inside: Any = torch.nn.Parameter(plain.detach().clone())
    inside.main_grad, inside.grad_added_to_main_grad = plain.main_grad.clone(), False
    hidden, grad = micro_batch()
    backward(hidden, plain, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        backward(hidden, inside, grad)
    assert torch.equal(plain.main_grad, inside.main_grad)


@pytest.mark.parametrize("case", ["no main_grad", "main_grad is None", "no flag", "megatron-fsdp"])
def test_otherwise_a_real_gradient_is_returned(case: str) -> None:
    weight = megatron_weight(None if case == "no main_grad" else torch.float32)
    if case == "main_grad is None":
        weight.main_grad = None
    if case == "no flag":
        del weight.grad_added_to_main_grad
    if case == "megatron-fsdp":
        weight.__fsdp_param__ = True
    main_grad = getattr(weight, "main_grad", None)
    before = None if main_grad is None else main_grad.clone()

    hidden = torch.randint(-4, 5, (3, HIDDEN)).bfloat16()
    grad = torch.randint(-4, 5, (3, VOCAB)).float()
    returned = backward(hidden, weight, grad)

    assert torch.equal(returned.double(), gradients_reference(hidden, weight, grad).weight_grad)
    assert not getattr(weight, "grad_added_to_main_grad", False)
    if before is not None:
        assert torch.equal(weight.main_grad, before)
