"""Log-probs of several tokens for every position, against float64 and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import (
    SelectedLogprobs,
    linear_logprobs,
    linear_selected_logprobs,
    linear_top_logprobs,
    workspace,
)
from tests.ops.logprobs_cases import BENT, PADDED, TOKENS, VOCAB, Case, case, exact_logits, grouped, with_main_grad

FP32 = 1e-6
K = 6
NAMES = ("logprobs", "logits", "rest", "entropy", "logsumexp")


def chosen(c: Case, k: int = K) -> Tensor:
    """Row 3 is ignored, row 4 has one slot twice, row 5 an empty slot, row 6 all slots equal."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.stack([torch.randperm(VOCAB, generator=generator)[:k] for _ in range(TOKENS)])
    tokens[:, 0] = c.labels.clamp(min=0).cpu()
    tokens[3], tokens[4, -1], tokens[5, 2], tokens[6] = -100, tokens[4, 0], -100, 9
    return tokens.to(c.labels.device)


def truth(c: Case, tokens: Tensor, upstream: dict[str, Tensor], **options: Any) -> tuple[dict[str, Tensor], Any, Any]:
    """Everything in float64 from one log-softmax, and dX and dW by autograd."""
    x, w, z = exact_logits(c, **options)
    logp = z.log_softmax(1)
    empty = tokens == -100
    ids = tokens.masked_fill(empty, 0)
    is_chosen = torch.zeros_like(z, dtype=torch.bool)
    for slot in range(tokens.shape[1]):
        is_chosen |= torch.arange(z.shape[1], device=z.device) == tokens[:, slot, None]
    rows = empty.all(1)
    out = {
        "logprobs": logp.gather(1, ids).masked_fill(empty, 0.0),
        "logits": z.gather(1, ids).masked_fill(empty, 0.0),
        "rest": logp.masked_fill(is_chosen, -torch.inf).logsumexp(1).masked_fill(rows, 0.0),
        "entropy": -(logp.exp() * logp).sum(1).masked_fill(rows, 0.0),
        "logsumexp": z.logsumexp(1).masked_fill(rows, 0.0),
    }
    total = sum((out[name] * g.double()).sum() for name, g in upstream.items())
    if upstream:
        total.backward()  # type: ignore[union-attr]
    return {n: t.detach() for n, t in out.items()}, x.grad, w.grad


@pytest.mark.parametrize("options", [{"vocab_size": VOCAB}, BENT], ids=["plain", "bent"])
def test_bias(options: dict[str, Any]) -> None:
    """A NaN in the padding's part of it does not matter."""
    c = case()
    tokens, bias = chosen(c), torch.randn(c.weight.shape[0])
    mine = torch.where(torch.arange(len(bias)) < VOCAB, bias, torch.nan).requires_grad_()
    out = linear_selected_logprobs(c.hidden, c.weight, tokens, bias=mine, grad_precision="bf16x3", **grouped(options))
    upstream = cotangents(out, NAMES)
    with_main_grad(c.weight)
    backward(out, upstream)
    leaf = bias.double().requires_grad_()
    exact, dx, dw = truth(c, tokens, upstream, bias=leaf, **options)
    for name in NAMES:
        assert relative_error(getattr(out, name), exact[name]) < 4 * FP32, name
    assert relative_error(c.weight.main_grad, dw) < 2e-6  # type: ignore[attr-defined]
    assert relative_error(c.hidden.grad, dx) < 3e-3
    assert mine.grad is not None
    assert leaf.grad is not None
    assert relative_error(mine.grad[:VOCAB], leaf.grad[:VOCAB]) < 2e-6
    assert mine.grad[VOCAB:].eq(0).all()


def cotangents(like: SelectedLogprobs, names: tuple[str, ...], seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(getattr(like, n).shape, generator=generator) for n in names}


def backward(out: SelectedLogprobs, upstream: dict[str, Tensor]) -> None:
    sum((getattr(out, name) * g.to(out.rest.device)).sum() for name, g in upstream.items()).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("options", [{}, BENT, {"vocab_size": VOCAB, "scale": -0.7}], ids=["plain", "bent", "negative"])
def test_results(dtype: torch.dtype, options: dict[str, Any]) -> None:
    c = case(dtype)
    tokens = chosen(c)
    out = linear_selected_logprobs(c.hidden, c.weight, tokens, **grouped(options))
    exact, _, _ = truth(c, tokens, {}, **options)
    for name in NAMES:
        # Most of these rests are almost 1. What their logs amount to is the rounding of a few logits.
        assert relative_error(getattr(out, name), exact[name]) < (4 * FP32 if name == "rest" else FP32), name
        assert getattr(out, name)[3].eq(0).all()
    assert out.logprobs[5, 2] == 0
    assert out.logits[5, 2] == 0
    assert out.tokens is tokens


@pytest.mark.parametrize("names", [(n,) for n in NAMES] + [NAMES], ids=[*NAMES, "all"])
@pytest.mark.parametrize("options", [{"vocab_size": VOCAB}, BENT], ids=["plain", "bent"])
def test_gradients(names: tuple[str, ...], options: dict[str, Any]) -> None:
    """With 24 bits of dY, so that nothing hides behind bfloat16."""
    c = case()
    tokens = chosen(c)
    out = linear_selected_logprobs(c.hidden, c.weight, tokens, grad_precision="bf16x3", **grouped(options))
    upstream = cotangents(out, names)
    with_main_grad(c.weight)
    backward(out, upstream)
    _, dx, dw = truth(c, tokens, upstream, **options)
    assert relative_error(c.weight.main_grad, dw) < 2e-6  # type: ignore[attr-defined]
    assert relative_error(c.hidden.grad, dx) < 3e-3  # rounded once to bfloat16
    assert c.hidden.grad is not None
    assert c.hidden.grad[3].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("grad_precision", ["bf16", "bf16x2"])
def test_gradients_of_every_dtype(dtype: torch.dtype, grad_precision: Any) -> None:
    c = case(dtype)
    tokens = chosen(c)
    out = linear_selected_logprobs(
        c.hidden, c.weight, tokens, grad_precision=grad_precision, vocab_parallel=PADDED, chunk_size=37
    )
    upstream = cotangents(out, NAMES)
    backward(out, upstream)
    _, dx, dw = truth(c, tokens, upstream, vocab_size=VOCAB)
    bound = 2e-6 if dtype == torch.float32 else 6e-3
    assert relative_error(c.hidden.grad, dx) < bound
    assert relative_error(c.weight.grad, dw) < bound


@pytest.mark.parametrize("columns", [128, 300])
def test_chunks_of_the_vocabulary(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots outside of a chunk of columns must not write into it."""
    monkeypatch.setattr(workspace, "BYTES", columns * 12 * TOKENS)
    c = case()
    tokens = chosen(c)
    tokens[:, 1] = 128 * torch.arange(TOKENS) % 640  # the first column of a chunk
    out = linear_selected_logprobs(c.hidden, c.weight.detach(), tokens, grad_precision="bf16x3", vocab_parallel=PADDED)
    upstream = cotangents(out, ("logprobs", "logits"))
    backward(out, upstream)
    _, dx, _ = truth(c, tokens, upstream, vocab_size=VOCAB)
    assert relative_error(c.hidden.grad, dx) < 3e-3


def test_one_token_is_what_linear_logprobs_returns() -> None:
    c = case(spread=30.0)  # many probabilities of almost 1
    out = linear_selected_logprobs(c.hidden, c.weight, c.labels[:, None], vocab_parallel=PADDED)
    one = linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED)
    for a, b in ((out.logprobs[:, 0], one.logprobs), (out.entropy, one.entropy), (out.logsumexp, one.logsumexp)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def confident() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp32 logits, their tokens: one of them has p = 1 - 1e-13, and the rest as little as 1e-40."""
    logits = torch.full((4, 300), -30.0)
    logits[:, 7], logits[:, 8], logits[2:] = 30.0, -0.5, logits[2:] - 60
    logits[2:, 7], logits[2:, 8] = 30.0, 29.0
    weight = torch.eye(300)
    return logits.requires_grad_(), weight, torch.tensor([[7, 8]] * 4), logits.detach().double()


@pytest.mark.parametrize("name", ["logprobs", "rest"])
def test_probabilities_near_one_and_zero_keep_their_digits(name: str) -> None:
    x, weight, tokens, exact = confident()
    out = linear_selected_logprobs(x, weight, tokens)
    exact.requires_grad_()
    logp = exact.log_softmax(1)
    rest = exact.clone()
    rest[:, 7:9] = -torch.inf
    log_rest = rest.logsumexp(1) - exact.logsumexp(1)
    torch.testing.assert_close(out.rest.double(), log_rest, rtol=1e-6, atol=0)
    others = exact.clone()
    others[:, 7] = -torch.inf
    first = -(others.logsumexp(1) - exact[:, 7]).exp().log1p()
    torch.testing.assert_close(out.logprobs[:, 0].double(), first, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.logprobs[:, 1].double(), logp[:, 1 + 7], rtol=1e-6, atol=0)
    if name == "rest":
        out.rest.sum().backward()
        log_rest.sum().backward()
    else:
        out.logprobs[:, 0].sum().backward()
        first.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=3e-6, atol=1e-44)


def test_a_rest_of_almost_one_keeps_its_digits() -> None:
    """The log of its probability is -2e-13."""
    x = torch.zeros(2, 300)
    x[:, 4:6] = -24.0
    exact = x.double().requires_grad_()
    leaf = x.requires_grad_()
    out = linear_selected_logprobs(leaf, torch.eye(300), torch.tensor([[4, 5]] * 2))
    others = torch.cat([exact[:, :4], exact[:, 6:]], 1)
    truth = -(exact[:, 4:6].exp().sum(1) / others.exp().sum(1)).log1p()
    torch.testing.assert_close(out.rest.double(), truth.detach(), rtol=1e-6, atol=0)
    assert -3e-13 < truth[0] < -2e-13
    out.rest.sum().backward()
    assert leaf.grad is not None
    # With R the rest's probability: p (1 - R) / R for the others, -p for the chosen tokens.
    p = exact.detach().softmax(1)
    chosen = p[:, 4:6].sum(1, keepdim=True)
    expected = p / (1 - chosen) * chosen
    expected[:, 4:6] = -p[:, 4:6]
    torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-6, atol=0)


def test_the_whole_vocabulary_leaves_no_rest() -> None:
    x = torch.randn(3, 40).requires_grad_()
    tokens = torch.arange(40).expand(3, 40)
    out = linear_selected_logprobs(x, torch.eye(40), tokens)
    assert torch.equal(out.rest, torch.full((3,), -torch.inf))
    torch.testing.assert_close(out.logprobs, x.log_softmax(1))
    g = torch.randn(3, 40)
    (out.logprobs * g).sum().backward()
    expected = g - x.softmax(1) * g.sum(1, keepdim=True)
    torch.testing.assert_close(x.grad, expected.detach())


def test_only_the_logits_of_the_tokens() -> None:
    """A function of the chosen logits has an exactly zero gradient elsewhere."""
    x = torch.randn(5, 200).requires_grad_()
    tokens = torch.tensor([[3, 150, 9]] * 5)
    out = linear_selected_logprobs(x, torch.eye(200), tokens)
    out.logits.log_softmax(1)[:, 0].sum().backward()
    assert x.grad is not None
    touched = (x.grad != 0).nonzero()[:, 1].unique().tolist()
    assert touched == [3, 9, 150]


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_wrong_with_one_position_stays_there(poison: float) -> None:
    c = case()
    x = c.hidden.detach().clone()
    x[3] = x[8] = poison
    tokens = chosen(c)
    tokens[10, 1] = VOCAB + 5  # padding: outside of the vocabulary
    weight = c.weight.detach().clone()
    weight[VOCAB:] = torch.nan
    c = c.copy(hidden=x, weight=weight)
    out = linear_selected_logprobs(c.hidden, c.weight, tokens, vocab_parallel=PADDED)
    good = [at for at in range(TOKENS) if at not in (3, 8, 10)]
    clean = linear_selected_logprobs(c.hidden[good], c.weight, tokens[good], vocab_parallel=PADDED)
    for name in NAMES:
        assert torch.equal(getattr(out, name)[good], getattr(clean, name)), name
        assert getattr(out, name)[3].eq(0).all(), name
    assert out.logprobs[8].isnan().all()
    assert out.logprobs[10].isnan().tolist() == [False, True, False, False, False, False]
    assert out.logits[10, 1].isnan()
    assert out.entropy[10].isfinite()
    g = cotangents(out, NAMES)
    for name in NAMES:
        g[name][8] = 0
        g[name][10] = 0
    backward(out, g)
    assert c.hidden.grad is not None
    assert c.hidden.grad.isfinite().all()
    assert c.hidden.grad[[3, 8, 10]].eq(0).all()
    assert c.weight.grad is not None
    assert c.weight.grad[:VOCAB].isfinite().all()
    assert c.weight.grad[VOCAB:].eq(0).all()


def test_a_gradient_of_a_token_that_is_not_there_is_nan() -> None:
    c = case()
    tokens = chosen(c)
    tokens[10, 1] = VOCAB + 5
    out = linear_selected_logprobs(c.hidden, c.weight.detach(), tokens, vocab_parallel=PADDED)
    out.logprobs[10, 1].backward()
    assert c.hidden.grad is not None
    assert c.hidden.grad[10].isnan().all()
    assert c.hidden.grad[[at for at in range(TOKENS) if at != 10]].eq(0).all()


@pytest.mark.parametrize("ignore_index", [0, 5, -1])
def test_a_token_of_the_vocabulary_may_mark_empty_slots(ignore_index: int) -> None:
    c = case()
    tokens = chosen(c)
    tokens = torch.where(tokens == ignore_index, VOCAB - 2, tokens)
    marked = torch.where(tokens == -100, ignore_index, tokens)
    expected = linear_selected_logprobs(c.hidden, c.weight, tokens, vocab_parallel=PADDED)
    got = linear_selected_logprobs(c.hidden, c.weight, marked, ignore_index=ignore_index, vocab_parallel=PADDED)
    for name in NAMES:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


class TestTop:
    @pytest.mark.parametrize("k", [1, 5, 200, VOCAB])
    @pytest.mark.parametrize("chunk_size", [None, 64])
    def test_results_and_gradients(self, k: int, chunk_size: int | None) -> None:
        c = case()
        mask = torch.ones(TOKENS, dtype=torch.bool)
        mask[3] = False
        out = linear_top_logprobs(
            c.hidden, c.weight, k, mask=mask, grad_precision="bf16x3", chunk_size=chunk_size, **grouped(BENT)
        )
        assert (out.tokens[3] == -1).all()
        ids = out.tokens.masked_fill(out.tokens < 0, -100)
        names = NAMES if k < VOCAB else ("logprobs", "logits", "entropy", "logsumexp")
        upstream = cotangents(out, names)
        with_main_grad(c.weight)
        backward(out, upstream)
        exact, dx, dw = truth(c, ids, upstream, **BENT)
        for name in names:
            assert relative_error(getattr(out, name), exact[name]) < FP32, name
        full, _, _ = truth(c, torch.arange(VOCAB).expand(TOKENS, VOCAB), {}, **BENT)
        expected = full["logprobs"].topk(k, 1).values.masked_fill(~mask[:, None], 0.0)
        assert relative_error(out.logprobs, expected) < FP32
        assert relative_error(c.hidden.grad, dx) < 3e-3
        assert relative_error(c.weight.main_grad, dw) < 2e-6  # type: ignore[attr-defined]

    def test_without_a_mask(self) -> None:
        c = case()
        a = linear_top_logprobs(c.hidden.view(15, 10, -1), c.weight, 3, vocab_parallel=PADDED)
        b = linear_top_logprobs(c.hidden, c.weight, 3, mask=torch.ones(TOKENS, dtype=torch.bool), vocab_parallel=PADDED)
        assert a.logprobs.shape == (15, 10, 3)
        for name in (*NAMES, "tokens"):
            assert torch.equal(getattr(a, name).flatten(), getattr(b, name).flatten())

    @pytest.mark.parametrize("mask", [torch.ones(TOKENS), [True] * TOKENS])
    def test_a_mask_of_another_type(self, mask: Any) -> None:
        c = case()
        with pytest.raises(TypeError, match=r"mask must be a bool tensor or None"):
            linear_top_logprobs(c.hidden, c.weight, 3, mask=mask)

    @pytest.mark.parametrize("k", [0, 701])
    def test_as_many_as_there_are(self, k: int) -> None:
        c = case()
        with pytest.raises(ValueError, match="k must be"):
            linear_top_logprobs(c.hidden, c.weight, k)


def test_no_positions() -> None:
    x, w = torch.zeros(0, 8).requires_grad_(), torch.randn(200, 8).requires_grad_()
    out = linear_selected_logprobs(x, w, torch.zeros(0, 3, dtype=torch.long))
    assert [tuple(f.shape) for f in out] == [(0, 3)] * 3 + [(0,)] * 3
    (out.logprobs.sum() + out.rest.sum()).backward()
    assert w.grad is not None
    assert w.grad.eq(0).all()
    assert linear_top_logprobs(x, w, 2).tokens.shape == (0, 2)


@pytest.mark.parametrize("shape", [(TOKENS,), (TOKENS, 0), (TOKENS - 1, 2), (TOKENS, 1, 2)])
def test_shapes_that_do_not_match(shape: tuple[int, ...]) -> None:
    c = case()
    with pytest.raises(ValueError, match=r"expected (tokens|labels)"):
        linear_selected_logprobs(c.hidden, c.weight, torch.zeros(shape, dtype=torch.long))


def test_second_derivatives_are_refused() -> None:
    c = case()
    out = linear_selected_logprobs(c.hidden, c.weight, chosen(c))
    (grad,) = torch.autograd.grad(out.logprobs.sum(), c.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.float().square().sum().backward()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_invariance(softcap: float | None) -> None:
    """One position alone has the bits that it has among others, and so has its gradient."""
    c = case()
    tokens = chosen(c)
    options: dict[str, Any] = grouped({"vocab_size": VOCAB, "softcap": softcap})
    whole = linear_selected_logprobs(c.hidden, c.weight.detach(), tokens, invariant=True, **options)
    upstream = cotangents(whole, NAMES)
    backward(whole, upstream)
    for rows in (slice(0, 1), slice(63, 66), slice(100, 150)):
        x = c.hidden.detach()[rows].clone().requires_grad_()
        part = linear_selected_logprobs(x, c.weight.detach(), tokens[rows], invariant=True, **options)
        backward(part, {n: g[rows] for n, g in upstream.items()})
        for name in NAMES:
            assert torch.equal(getattr(part, name), getattr(whole, name)[rows]), name
        assert torch.equal(x.grad, c.hidden.grad[rows])  # type: ignore[index,arg-type]
