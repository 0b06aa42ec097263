"""Bits that depend on neither the batch nor the padding nor the sharding, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import gradients_reference, relative_error
from megatron_fp32.ops.logprobs import linear_logprobs
from megatron_fp32.ops.logprobs.statistics import block_statistics, combine
from megatron_fp32.ops.products.fixed_order import fixed_order_product
from megatron_fp32.ops.products.shard import BLOCK
from tests.ops.logprobs_cases import softmax

TOKENS, HIDDEN = 150, 96


def operands(rows: int, hidden: int = HIDDEN) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, hidden).bfloat16()
    w = (torch.randn(rows, hidden) / 4).bfloat16()
    return x, w, torch.randint(rows, (TOKENS,))


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return fixed_order_product(x, w, torch.full((len(x), len(w)), torch.nan))


def test_the_product_is_the_product() -> None:
    x, w, _ = operands(700)
    assert relative_error(product(x, w), x.double() @ w.double().t()) < 3e-7


def test_the_library_s_own_product_is_not_invariant() -> None:
    """If this fails, torch has learnt it, and the fixed order costs time for nothing."""
    x, w, _ = operands(700, hidden=1024)
    whole = x.float() @ w.float().t()
    assert any(not torch.equal(x[:n].float() @ w.float().t(), whole[:n]) for n in (1, 2, 3, 7))


@pytest.mark.parametrize("with_bias", [False, True])
def test_logits_of_the_output_layer(with_bias: bool) -> None:
    x, w, _ = operands(700, hidden=1024)
    x, w, cotangent = x.view(50, 3, -1).requires_grad_(), w.requires_grad_(), torch.randn(50, 3, 700)
    bias = torch.randn(700).bfloat16() if with_bias else None
    whole = fp32_logits(x, w, bias, invariant=True)
    assert torch.equal(whole, torch.compile(fp32_logits, backend="eager")(x, w, bias, invariant=True))
    for count in (1, 2, 7):
        assert torch.equal(fp32_logits(x[:count], w, bias, invariant=True), whole[:count])
    whole.backward(cotangent)
    truth = gradients_reference(x.detach(), w.detach(), cotangent, bias)
    assert relative_error(whole.detach(), truth.logits) < 1e-6
    assert relative_error(x.grad, truth.hidden_grad) < 4e-3
    with pytest.raises(ValueError, match="invariant=True cannot be kept here"):
        fp32_logits(x.float(), w, invariant=True)


@given(
    start=st.integers(0, TOKENS - 1), count=st.integers(1, TOKENS), first=st.integers(0, 5), blocks=st.integers(1, 6)
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_any_part_of_the_product_has_the_bits_of_the_whole(start: int, count: int, first: int, blocks: int) -> None:
    x, w, _ = operands(700, hidden=256)
    rows, columns = slice(start, start + count), slice(first * 128, (first + blocks) * 128)
    assert torch.equal(product(x[rows].clone(), w[columns].clone()), product(x, w)[rows, columns])


@given(start=st.integers(0, TOKENS - 1), count=st.integers(1, TOKENS))
@settings(deadline=None, max_examples=20, derandomize=True)
def test_a_token_is_the_same_in_every_batch(start: int, count: int) -> None:
    x, w, y = operands(700)
    rows = slice(start, start + count)
    whole = linear_logprobs(x, w, y, invariant=True, mean_logit=True, top_k=5)
    part = linear_logprobs(x[rows].clone(), w, y[rows].clone(), invariant=True, mean_logit=True, top_k=5)
    for a, b in zip(part, whole, strict=True):
        assert a is not None
        assert torch.equal(a, b[rows])


@pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
def test_the_gradient_of_a_token_is_the_same_in_every_batch(precision: Any) -> None:
    x, w, y = operands(700)
    upstream = torch.randn(TOKENS)

    def hidden_grad(rows: slice) -> torch.Tensor:
        leaf = x[rows].clone().requires_grad_()
        out = linear_logprobs(leaf, w, y[rows].clone(), invariant=True, grad_precision=precision)
        out.logprobs.backward(upstream[rows])
        assert leaf.grad is not None
        return leaf.grad

    whole = hidden_grad(slice(None))
    for start, stop in ((0, 1), (TOKENS - 1, TOKENS), (3, 70), (60, 130)):
        assert torch.equal(hidden_grad(slice(start, stop)), whole[start:stop])


def test_a_gradient_that_would_depend_on_the_batch_is_refused() -> None:
    x, w, y = (t.half() if t.is_floating_point() else t for t in operands(700))
    with pytest.raises(ValueError, match=r"invariant=True cannot be kept here: float16 pieces of dY share one scale"):
        linear_logprobs(x.requires_grad_(), w, y, invariant=True, grad_precision="bf16x2")
    linear_logprobs(x.detach(), w, y, invariant=True, grad_precision="bf16x2")


@pytest.mark.parametrize("bad", ["label", "weight", "huge"])
def test_a_gradient_that_is_no_number_says_so(bad: str) -> None:
    """Integers have no NaN: what must not be added as one is announced by its bound."""
    x, w, y = operands(700)
    leaf, upstream = x.clone().requires_grad_(), torch.ones(TOKENS)
    if bad == "label":
        y = y.index_fill(0, torch.tensor([4]), 5000)
    elif bad == "weight":
        w = w.clone()
        w[3, 3] = torch.nan
    else:
        upstream[4] = 1e38
        w = (w.float() * 100).bfloat16()
    linear_logprobs(leaf, w, y, invariant=True).logprobs.backward(upstream)
    assert leaf.grad is not None
    wrong = leaf.grad.isnan().all(1)
    assert wrong.all() if bad == "weight" else wrong.nonzero().flatten().tolist() == [4]


@pytest.mark.parametrize("vocab", [1, 127, 128, 1000, 1187 * 8])
def test_any_sharding_under_megatrons_padding(vocab: int) -> None:
    """What the ranks would compute, put together as they do."""
    x, rows, y = operands(vocab, hidden=32)
    inverse_temperature, results = torch.ones(64), []
    for ranks in (1, 2, 4, 8):
        padded = -(-vocab // (BLOCK * ranks)) * BLOCK * ranks
        w = torch.cat([rows, torch.full((padded - vocab, 32), 7.0).bfloat16()])
        columns, parts = padded // ranks, []
        for rank in range(ranks):
            first = rank * columns
            part = softmax(
                columns, first_column=first, valid_columns=min(max(vocab - first, 0), columns), vocab_size=vocab,
                invariant=True,
            )  # fmt: skip
            rows_of_rank, labels = w[first : first + columns], part.shard.local_labels(y[:64])
            parts.append(
                block_statistics(x[:64], rows_of_rank, labels, inverse_temperature, part, mean="logit", keep=None)
            )
        statistics = combine(torch.cat([statistics for statistics, _ in parts]))
        results.append((statistics, torch.stack([label for _, label in parts]).sum(0)))
    for statistics, label in results[1:]:
        assert torch.equal(statistics, results[0][0])
        assert torch.equal(label, results[0][1])
