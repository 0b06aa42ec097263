"""`fp32_logits` where tensors are fake and compilers look: FakeTensor, export, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_fp32.ops.logits import custom_op, fp32_logits
from megatron_fp32.ops.logits.reference import gradients_reference
from megatron_fp32.ops.products.grad_precision import GradPrecision

HIDDEN, VOCAB = 16, 40
PRECISIONS = pytest.mark.parametrize("precision", ["bf16", "bf16x2", "bf16x3"])


def integers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randint(-8, 9, shape).to(dtype).requires_grad_()


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_the_operator_is_what_it_declares(with_bias: bool, hidden_dtype: torch.dtype) -> None:
    hidden, weight = integers(3, 2, HIDDEN, dtype=hidden_dtype), integers(VOCAB, HIDDEN)
    bias = integers(VOCAB) if with_bias else None
    for invariant in {False, hidden_dtype == torch.bfloat16}:
        checks = torch.library.opcheck(custom_op.logits, (hidden, weight, bias, 2, invariant))
        assert set(checks.values()) == {"SUCCESS"}


@PRECISIONS
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("bias",)])
def test_its_gradients_are_those_of_the_eager_function(precision: GradPrecision, frozen: tuple[str, ...]) -> None:
    inputs = {"hidden": integers(3, 2, HIDDEN), "weight": integers(VOCAB, HIDDEN), "bias": integers(VOCAB)}
    for name in frozen:
        inputs[name].requires_grad_(False)
    grad, pieces = torch.randn(3, 2, VOCAB), {"bf16": 1, "bf16x2": 2, "bf16x3": 3}[precision]
    wanted = [tensor for tensor in inputs.values() if tensor.requires_grad]
    ours = torch.autograd.grad(custom_op.logits(*inputs.values(), pieces), wanted, grad)
    eager = torch.autograd.grad(fp32_logits(*inputs.values(), grad_precision=precision), wanted, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


@PRECISIONS
def test_fake_tensors(precision: GradPrecision) -> None:
    with FakeTensorMode():
        hidden = torch.empty(3, 2, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        logits = fp32_logits(hidden, torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16), grad_precision=precision)
        assert (logits.shape, logits.dtype) == ((3, 2, VOCAB), torch.float32)
        (grad,) = torch.autograd.grad(logits.sum(), hidden)
        assert (grad.shape, grad.dtype) == (hidden.shape, torch.bfloat16)


@pytest.mark.skipif(torch.version.cuda is None, reason="this build of torch has no CUDA, not even a fake one")
def test_fake_cuda_tensors() -> None:
    with FakeTensorMode():
        hidden = torch.empty(3, 2, HIDDEN, dtype=torch.bfloat16, device="cuda")
        logits = fp32_logits(hidden, torch.empty(VOCAB, HIDDEN, dtype=torch.bfloat16, device="cuda"))
        assert (logits.shape, logits.dtype, logits.device.type) == ((3, 2, VOCAB), torch.float32, "cuda")


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(integers(VOCAB, HIDDEN).detach())

    def forward(self, hidden: Tensor) -> Tensor:
        return fp32_logits(hidden * 2, self.weight).div_(2)


def test_export_keeps_the_operator_and_any_number_of_tokens() -> None:
    head = Head()
    tokens = torch.export.Dim("tokens", min=2, max=512)
    program = torch.export.export(head, (integers(6, 2, HIDDEN).detach(),), dynamic_shapes=({0: tokens},))
    assert "megatron_fp32.logits" in str(program.graph)
    other = integers(11, 2, HIDDEN).detach()
    assert torch.equal(program.module()(other), head(other))


@PRECISIONS
def test_compiled_without_a_break_and_without_another_bit(precision: GradPrecision) -> None:
    hidden, weight, grad = integers(5, 2, HIDDEN), integers(VOCAB, HIDDEN), torch.randn(5, 2, VOCAB)

    def run(x: Tensor, w: Tensor) -> Tensor:
        return fp32_logits(x * 2, w, grad_precision=precision).div_(2)

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        logits = function(hidden, weight)
        results.append((logits, *torch.autograd.grad(logits, (hidden, weight), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_with_main_grad_the_graph_breaks_and_dw_stays_fp32() -> None:
    head: Any = Head()
    head.weight.main_grad, head.weight.grad_added_to_main_grad = torch.zeros(VOCAB, HIDDEN), False
    counter = CompileCounter()
    hidden, grad = integers(5, 2, HIDDEN), torch.randn(5, 2, VOCAB)
    torch.compile(head, backend=counter)(hidden).backward(grad)
    assert counter.frame_count == 2  # what comes before and what comes after
    truth = gradients_reference(hidden.detach() * 2, head.weight.detach(), (grad / 2).bfloat16()).weight_grad
    assert torch.allclose(head.weight.main_grad.double(), truth, rtol=1e-6, atol=1e-5)
    assert head.weight.grad_added_to_main_grad


def test_a_full_graph_with_main_grad_is_refused() -> None:
    head: Any = Head()
    head.weight.main_grad, head.weight.grad_added_to_main_grad = torch.zeros(VOCAB, HIDDEN), False
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(head, fullgraph=True, backend="eager")(integers(5, 2, HIDDEN))
