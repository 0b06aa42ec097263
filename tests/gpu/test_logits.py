"""The CUDA path of the logits against float64, on the device."""

from __future__ import annotations

import pytest
import torch

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import gradients_reference, relative_error
from megatron_fp32.ops.products.chunks import CHUNK
from megatron_fp32.ops.products.grad_precision import GradPrecision
from megatron_fp32.ops.products.split import split_scale, split_torch

pytestmark = pytest.mark.gpu

TOKENS, HIDDEN, VOCAB = 300, 512, 4001  # nothing a tile divides


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(TOKENS, 1, HIDDEN, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, device="cuda") / HIDDEN**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randn(TOKENS, 1, VOCAB, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_and_gradients_against_float64(dtype: torch.dtype) -> None:
    hidden, weight, cotangent = operands(dtype)
    truth = gradients_reference(hidden.detach(), weight.detach(), cotangent)
    logits = fp32_logits(hidden, weight)
    logits.backward(cotangent)
    stock = hidden.detach() @ weight.detach().t()
    low = cotangent.to(dtype).reshape(-1, VOCAB)
    hidden_grad = (low.double() @ weight.detach().double()).to(dtype).view_as(hidden)
    weight_grad = (low.t().double() @ hidden.detach().reshape(-1, HIDDEN).double()).to(dtype)

    assert relative_error(logits, truth.logits) * 50 < relative_error(stock, truth.logits)
    assert relative_error(hidden.grad, truth.hidden_grad) < 1.1 * relative_error(hidden_grad, truth.hidden_grad)
    assert relative_error(weight.grad, truth.weight_grad) < 1.1 * relative_error(weight_grad, truth.weight_grad)


def test_main_grad_accumulates_in_fp32_over_micro_batches() -> None:
    _, weight, _ = operands(torch.bfloat16)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    truth = torch.zeros_like(weight, dtype=torch.float64)
    rounded = torch.zeros_like(truth)
    for _ in range(4):
        hidden, _, cotangent = operands(torch.bfloat16)
        fp32_logits(hidden, weight).backward(cotangent)
        truth += gradients_reference(hidden.detach(), weight.detach(), cotangent).weight_grad
        rounded += gradients_reference(hidden.detach(), weight.detach(), cotangent.bfloat16()).weight_grad
    assert weight.grad_added_to_main_grad
    # The only rounding is that of dY.
    assert relative_error(weight.main_grad, truth) < 1.1 * relative_error(rounded, truth)
    assert relative_error(weight.main_grad, rounded) < 2e-5


def test_31_integer_operands_are_exact() -> None:
    hidden = torch.randint(-8, 9, (64, 1, 256), device="cuda").bfloat16().requires_grad_()
    weight = torch.randint(-8, 9, (777, 256), device="cuda").bfloat16().requires_grad_()
    cotangent = torch.randint(-8, 9, (64, 1, 777), device="cuda").float()
    logits = fp32_logits(hidden, weight)
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    logits.backward(cotangent)
    truth = gradients_reference(hidden.detach(), weight.detach(), cotangent)
    assert torch.equal(logits.double(), truth.logits)
    assert torch.equal(weight.main_grad.double(), truth.weight_grad)
    assert torch.equal(hidden.grad, truth.hidden_grad.bfloat16())


def test_autocast_and_tf32_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, cotangent = operands(torch.bfloat16)

    def run() -> list[torch.Tensor]:
        hidden.grad = weight.grad = None
        logits = fp32_logits(hidden, weight)
        logits.backward(cotangent)
        return [logits.detach(), hidden.grad, weight.grad]

    plain = run()
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    with torch.autocast("cuda", torch.float16):
        around = run()
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert all(torch.equal(a, b) for a, b in zip(plain, around, strict=True))


def test_fp32_operands_under_tf32_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _ = (t.detach().float() for t in operands(torch.bfloat16))
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    with pytest.raises(ValueError, match="TF32 is allowed"):
        fp32_logits(hidden, weight)


def test_logits_can_be_divided_in_place_at_batch_one() -> None:
    hidden, weight, cotangent = operands(torch.bfloat16)
    logits = fp32_logits(hidden, weight)
    assert logits._base is None
    logits.transpose(0, 1).contiguous().div_(0.7).backward(cotangent.transpose(0, 1))
    truth = gradients_reference(hidden.detach(), weight.detach(), cotangent / 0.7)
    assert relative_error(hidden.grad, truth.hidden_grad) < 4e-3


def test_no_tokens() -> None:
    hidden = torch.empty(0, 2, HIDDEN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    _, weight, _ = operands(torch.bfloat16)
    fp32_logits(hidden, weight).sum().backward()
    assert hidden.grad.shape == hidden.shape
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_triton_split_is_bit_equal_to_the_definition(dtype: torch.dtype, count: int) -> None:
    from megatron_fp32.ops.products.split_triton import split_triton

    wide = torch.randn(300, 10001, device="cuda") * torch.logspace(-40, 37, 10001, device="cuda")
    wide[0, :6] = torch.tensor([0.0, -0.0, 3e38, -3.4e38, 1e-40, 2.0**-133], device="cuda")
    special = wide.clone()
    special[1, 5:8] = torch.tensor([float("inf"), float("-inf"), float("nan")], device="cuda")
    for x in (wide, special, wide[:, 17:5000], wide.t().contiguous().t(), wide[:, :1], wide[:0], wide[:, ::2]):
        scale = split_scale(x, count, dtype)
        for a, b in zip(split_triton(x, count, dtype, scale), split_torch(x, count, dtype, scale), strict=True):
            # NaN has many bit patterns; and the kernel's fused multiply-add keeps the sign of what underflows.
            same = (a.view(torch.int16) == b.view(torch.int16)) | (a.isnan() & b.isnan()) | ((a == 0) & (b == 0))
            assert same.all(), (a[~same], b[~same])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["bf16x2", "bf16x3"])
def test_split_gradients_of_an_fp32_residual_stream(dtype: torch.dtype, precision: GradPrecision) -> None:
    vocab = 3 * CHUNK + 1000
    hidden = torch.randn(512, HIDDEN, device="cuda").requires_grad_()
    weight = (torch.randn(vocab, HIDDEN, device="cuda") / HIDDEN**0.5).to(dtype).requires_grad_()
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False
    cotangent = torch.randn(512, vocab, device="cuda") * 1e-7
    truth = gradients_reference(hidden.detach(), weight.detach(), cotangent)
    logits = fp32_logits(hidden, weight, grad_precision=precision)
    logits.backward(cotangent)
    # The tensor core's own truncation within a chunk, measured: 2e-5 at 8192 terms.
    assert relative_error(logits, truth.logits) < 1e-5
    assert relative_error(hidden.grad, truth.hidden_grad) < 4e-5
    assert relative_error(weight.main_grad, truth.weight_grad) < 4e-5


@pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
def test_21_a_cuda_graph_replays_forward_and_backward(precision: GradPrecision) -> None:
    hidden, weight, cotangent = operands(torch.bfloat16)
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight, dtype=torch.float32), False

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        logits = fp32_logits(hidden, weight, grad_precision=precision)
        return logits, torch.autograd.grad(logits, (hidden, weight), cotangent)[0]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, hidden_grad = step()
    with torch.no_grad():
        hidden.copy_(torch.randn_like(hidden))
        cotangent.copy_(torch.randn_like(cotangent))
    weight.main_grad.zero_()
    graph.replay()
    replayed = logits.clone(), hidden_grad.clone(), weight.main_grad.clone()
    weight.main_grad.zero_()
    eager = *step(), weight.main_grad
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


@pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
def test_torch_compile_changes_no_bit(precision: GradPrecision) -> None:
    hidden, weight, cotangent = operands(torch.bfloat16)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return fp32_logits(x * 2, w, grad_precision=precision)

    eager = loss(hidden, weight)
    expected = torch.autograd.grad(eager, (hidden, weight), cotangent)
    compiled = torch.compile(loss, fullgraph=True)(hidden, weight)
    actual = torch.autograd.grad(compiled, (hidden, weight), cotangent)
    assert torch.equal(eager, compiled)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
