"""`logprobs_from_logits` against softmaxes in float64, in one process; the ranks are in the other file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32 import VocabParallel
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import from_logits
from megatron_fp32.ops.logprobs.from_logits import logprobs_from_logits
from megatron_fp32.ops.logprobs.stored_rows import StoredRows
from tests.ops.live_bytes import LiveBytes

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
SHAPE, COLUMNS, VOCAB = (3, 5), 300, 290

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda z: z,
    "transposed": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda z: torch.cat([z, z], 1)[:, : z.shape[1]],
    "narrowed": lambda z: torch.cat([z, z], 2)[..., : z.shape[2]],
    "columns first": lambda z: z.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "expanded": lambda z: z[:1].expand(z.shape),
}


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with NaN in their padding, labels, temperatures."""
    logits = torch.randn(*SHAPE, COLUMNS) * 4
    logits[..., VOCAB:] = torch.nan
    return logits.to(dtype), torch.randint(VOCAB, SHAPE), torch.rand(SHAPE) + 0.5


def truth(logits: Tensor, labels: Tensor, temperature: Tensor, upstream: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Log-prob, entropy and logsumexp in float64, and the gradient of the logits."""
    z = logits.detach().double().contiguous().requires_grad_()
    scaled = z[..., :VOCAB] / temperature.double()[..., None]
    log_p = scaled.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    outputs = [log_p.gather(-1, labels[..., None])[..., 0], entropy, scaled.logsumexp(-1)]
    torch.autograd.backward(outputs, [g.double() for g in upstream])
    assert z.grad is not None
    return [x.detach() for x in outputs], z.grad


def run(logits: Tensor, labels: Tensor, upstream: list[Tensor], **options: Any) -> tuple[list[Tensor], Tensor]:
    """The same three, and the gradient of the logits, which are a leaf."""
    leaf = logits.detach().requires_grad_()
    out = logprobs_from_logits(leaf, labels, **options)
    torch.autograd.backward(list(out[:3]), upstream)
    assert leaf.grad is not None
    return [x.detach() for x in out[:3]], leaf.grad


@DTYPES
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_size", [None, 4, 1])
def test_results_and_gradient(dtype: torch.dtype, layout: str, chunk_size: int | None) -> None:
    logits, labels, temperature = problem(dtype)
    logits = LAYOUTS[layout](logits)
    before = logits.clone()
    upstream = [torch.randn(SHAPE) for _ in range(3)]
    expected, expected_grad = truth(logits, labels, temperature, upstream)
    outputs, grad = run(
        logits, labels, upstream, temperature=temperature, chunk_size=chunk_size,
        vocab_parallel=VocabParallel(vocab_size=VOCAB),
    )  # fmt: skip
    for got, exact in zip(outputs, expected, strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, exact) < 5e-7
    assert grad.dtype == dtype
    assert torch.equal(grad[..., VOCAB:], torch.zeros_like(grad[..., VOCAB:]))
    # Rounded once: what is left of the error is fp32's.
    once = relative_error(expected_grad.to(dtype), expected_grad)
    assert relative_error(grad, expected_grad) < 1.001 * once + 5e-7
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))


def test_results_are_of_the_label_however_sure_it_is() -> None:
    """log p and 1 - p keep their digits down to 1 - p = 1e-17."""
    logits, labels = torch.randn(40, 200), torch.randint(200, (40,))
    logits[torch.arange(40), labels] = torch.linspace(0, 45, 40)
    (logprobs, *_), grad = run(logits, labels, [torch.ones(40), torch.zeros(40), torch.zeros(40)])
    z = logits.double()
    own = torch.zeros_like(z, dtype=torch.bool).scatter(1, labels[:, None], True)
    others = (z - z.gather(1, labels[:, None])).masked_fill(own, -torch.inf).exp().sum(1)
    assert ((logprobs + others.log1p()) / others.log1p()).abs().max() < 1e-5
    rest = others / (1 + others)
    assert ((grad[own] - rest) / rest).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_hostile_token_touches(dtype: torch.dtype) -> None:
    logits, labels, temperature = problem(dtype)
    upstream = [torch.randn(SHAPE) for _ in range(3)]
    options: dict[str, Any] = {"vocab_parallel": VocabParallel(vocab_size=VOCAB), "chunk_size": 4}
    clean, clean_grad = run(logits, labels, upstream, temperature=temperature, **options)
    hostile, bad = logits.clone(), torch.zeros(SHAPE, dtype=torch.bool)
    hostile[0, 0, 5], hostile[0, 1], hostile[0, 2] = torch.nan, torch.inf, -torch.inf
    hostile[1, 0], hostile[2, 1] = torch.nan, torch.nan
    wrong_labels, wrong_temperature = labels.clone(), temperature.clone()
    wrong_labels[1, 0], wrong_labels[1, 1], wrong_labels[1, 2] = -100, VOCAB, -7
    wrong_temperature[1, 0], wrong_temperature[1, 3] = torch.nan, -1.0
    upstream_of_it = [g.clone() for g in upstream]
    for g in upstream_of_it:
        g[1, 0], g[2, 1], g[2, 2] = torch.nan, 0.0, torch.nan
    bad[0, :3], bad[1, :4], bad[2, 1:3] = True, True, True
    outputs, grad = run(hostile, wrong_labels, upstream_of_it, temperature=wrong_temperature, **options)
    for got, expected in zip(outputs, clean, strict=True):
        assert torch.equal(got[~bad], expected[~bad])
        assert got[1, 0] == 0
        assert got[0, :2].isnan().all()
        assert got[1, 3].isnan()
    assert torch.equal(grad[~bad], clean_grad[~bad])
    assert (grad[1, 0] == 0).all(), "an ignored token"
    assert (grad[2, 1] == 0).all(), "upstream gradients of 0"
    assert grad[0, 0, :VOCAB].isnan().all()
    # An impossible label takes the log-prob, and neither the entropy nor the logsumexp.
    assert outputs[0][1, 1:3].isnan().all()
    for got, expected in zip(outputs[1:], clean[1:], strict=True):
        torch.testing.assert_close(got[1, 1:3], expected[1, 1:3], rtol=1e-6, atol=1e-6)


@DTYPES
@pytest.mark.parametrize("layout", ["dense", "transposed", "narrowed"])
def test_the_gradient_takes_the_place_of_the_logits(dtype: torch.dtype, layout: str) -> None:
    logits, labels, _ = problem(dtype)
    upstream = [torch.randn(SHAPE) for _ in range(3)]
    parallel = VocabParallel(vocab_size=VOCAB)
    _, expected = run(logits, labels, upstream, vocab_parallel=parallel)
    used = LAYOUTS[layout](logits.clone().requires_grad_() * 1)
    out = logprobs_from_logits(used, labels, vocab_parallel=parallel, chunk_size=4, inplace_backward=True)
    (grad,) = torch.autograd.grad(list(out[:3]), used, upstream, retain_graph=True)
    assert torch.equal(grad, expected)
    assert grad.data_ptr() == used.data_ptr()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(list(out[:3]), upstream)


def test_another_operator_hears_of_logits_that_are_gone() -> None:
    logits, labels, _ = problem()
    used = (logits[..., :VOCAB].contiguous().requires_grad_() * 2).contiguous()
    other = (used * used).sum()
    logprobs_from_logits(used, labels, inplace_backward=True).logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_nothing_in_fp32_but_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens at a time of 512, whose fp32 logits would take 32 of what is counted here."""
    monkeypatch.setattr(from_logits.workspace, "BYTES", 4 * 1024 * 16)
    logits, labels = torch.randn(512, 1024).bfloat16().requires_grad_(), torch.randint(1024, (512,))
    chunk = 4 * 1024 * 16
    with LiveBytes() as live:
        out = logprobs_from_logits(logits, labels)
        assert live.peak < 8 * chunk
        out.logprobs.sum().backward()
        assert live.peak < logits.numel() * 2 + 16 * chunk


@pytest.mark.parametrize("shape", [(0,), (0, 4), ()])
def test_none_and_one_token(shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 50, requires_grad=True)
    out = logprobs_from_logits(logits, torch.zeros(shape, dtype=torch.int32))
    out.logprobs.sum().backward()
    assert out.logprobs.shape == out.entropy.shape == shape
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape


def test_a_second_derivative_is_refused() -> None:
    logits = torch.randn(3, 9, requires_grad=True)
    out = logprobs_from_logits(logits, torch.zeros(3, dtype=torch.int64)).logprobs.sum()
    (grad,) = torch.autograd.grad(out, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.square().sum().backward()


def test_rows_are_found_in_the_order_of_memory() -> None:
    z = torch.randn(4, 3, 8)
    assert not StoredRows(z.transpose(0, 1)).copied
    assert StoredRows(z[:, :2]).copied
    assert not StoredRows(z[:1].expand(2, 3, 8)).writable
    assert not StoredRows(z.reshape(1, -1).as_strided((5, 8), (4, 1))).writable


LEAF = torch.randn(2, 3, 20, requires_grad=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.randn(2, 3, 20).double()}, TypeError, "logits must be bfloat16, float16 or float32"),
        ({"labels": torch.zeros(2, 3)}, TypeError, "labels must be int64 or int32, got torch.float32"),
        ({"labels": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "labels of their leading shape"),
        ({"logits": torch.randn(2, 3, 0)}, ValueError, "labels of their leading shape"),
        ({"vocab_parallel": 3}, TypeError, "vocab_parallel must be a VocabParallel or None, got 3"),
        ({"vocab_parallel": VocabParallel(sequence_parallel=True)}, ValueError, "sequence_parallel must be False"),
        ({"vocab_parallel": VocabParallel(vocab_size=21)}, ValueError, "1 to 20, the columns of the logits, got 21"),
        ({"ignore_index": 3}, ValueError, "ignore_index must not be a token of the vocabulary, got 3"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.ones(2)}, ValueError, "expected a temperature without gradient"),
        ({"inplace_backward": 1}, TypeError, "inplace_backward must be True or False"),
        ({"logits": LEAF, "inplace_backward": True}, ValueError, "it would destroy a parameter"),
        ({"logits": (LEAF * 2)[:1].expand(2, 3, 20), "inplace_backward": True}, ValueError, "rows overlap"),
        ({"logits": (LEAF.repeat(1, 2, 1) * 2)[:, :3], "inplace_backward": True}, ValueError, "not dense in memory"),
    ],
)
def test_refused_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    usual = {"logits": torch.randn(2, 3, 20), "labels": torch.zeros(2, 3, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        logprobs_from_logits(**(usual | arguments))
