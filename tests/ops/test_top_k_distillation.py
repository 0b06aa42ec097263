"""Distillation from a teacher's top-k, against float64 and autograd over the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import Divergence, linear_top_k_distillation
from tests.ops.logprobs_cases import BENT, PADDED, TOKENS, VOCAB, Case, case, exact_logits, grouped, with_main_grad

K = 8
DIVERGENCES = {
    "forward": Divergence(forward=1.0),
    "reverse": Divergence(reverse=1.0),
    "jsd": Divergence(jsd=1.0, beta=0.3),
    "all": Divergence(forward=0.5, reverse=0.25, jsd=2.0, beta=0.8),
}


def teacher(c: Case, distance: float, **options: Any) -> tuple[Tensor, Tensor]:
    """Tokens and log-probs of a teacher whose logits differ by so much; row 3 is ignored, row 4 has an empty slot."""
    z = exact_logits(c, **options)[2].detach()
    logq = (z + distance * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))).log_softmax(1)
    logprobs, tokens = logq.topk(K, 1)
    tokens[3], tokens[4, 2] = -100, -100
    logprobs[3], logprobs[4, 2] = torch.nan, torch.nan
    return tokens, logprobs.float()


def kl(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(a > 0, a * (a.clamp(min=1e-300).log() - b.clamp(min=1e-300).log()), 0.0)


def truth(c: Case, tokens: Tensor, logq: Tensor, rest: str, how: Divergence, **options: Any) -> tuple[Tensor, Any, Any]:
    x, w, z = exact_logits(c, **options)
    empty = tokens == -100
    ids = tokens.masked_fill(empty, 0)
    p = z.softmax(1).gather(1, ids).masked_fill(empty, 0.0)
    q = logq.double().exp().masked_fill(empty, 0.0)
    if rest == "event":
        p = torch.cat([p, 1 - p.sum(1, keepdim=True)], 1)
        q = torch.cat([q, 1 - q.sum(1, keepdim=True)], 1)
    if rest == "renormalize":
        p, q = (t / t.sum(1, keepdim=True).masked_fill(t.sum(1, keepdim=True) == 0, 1.0) for t in (p, q))
    m = how.beta * q + (1 - how.beta) * p
    terms = how.forward * kl(q, p) + how.reverse * kl(p, q)
    terms = terms + how.jsd * (how.beta * kl(q, m) + (1 - how.beta) * kl(p, m))
    value = terms.sum(1).masked_fill(empty.all(1), 0.0)
    g = torch.randn(TOKENS, generator=torch.Generator().manual_seed(9)).double()
    (value * g).sum().backward()
    return value.detach(), x.grad, w.grad


@pytest.mark.parametrize("options", [{"vocab_size": VOCAB}, BENT], ids=["plain", "bent"])
@pytest.mark.parametrize("rest", ["event", "renormalize", "drop"])
@pytest.mark.parametrize("which", DIVERGENCES)
def test_values_and_gradients(which: str, rest: Any, options: dict[str, Any]) -> None:
    c, how = case(), DIVERGENCES[which]
    tokens, logq = teacher(c, 1.0, **options)
    with_main_grad(c.weight)
    out = linear_top_k_distillation(
        c.hidden, c.weight, tokens, logq, divergence=how, rest=rest, grad_precision="bf16x3", **grouped(options)
    )
    value, dx, dw = truth(c, tokens, logq, rest, how, **options)
    assert relative_error(out.divergence, value) < 2e-6
    assert out.divergence[3] == 0
    g = torch.randn(TOKENS, generator=torch.Generator().manual_seed(9))
    (out.divergence * g).sum().backward()
    assert relative_error(c.hidden.grad, dx) < 3e-3
    assert relative_error(c.weight.main_grad, dw) < 3e-6  # type: ignore[attr-defined]
    assert not out.logprobs.requires_grad
    assert not out.rest.requires_grad
    assert out.entropy.requires_grad


@pytest.mark.parametrize("which", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("rest", ["event", "renormalize"])
def test_close_to_the_teacher_the_digits_stay(which: str, rest: Any) -> None:
    """fp32 operands; a divergence of some 1e-7, whose terms are 1e-4."""
    torch.manual_seed(0)
    x = torch.randn(40, 300)
    tokens = x.topk(6, 1).indices
    exact = x.double().requires_grad_()
    # A teacher in float64, whose log-probs are rounded; what they were rounded to is the truth.
    logq = (x.double() + 3e-4 * torch.randn(40, 300).double()).log_softmax(1).gather(1, tokens).float()
    how = DIVERGENCES[which]
    p = exact.softmax(1).gather(1, tokens)
    q = logq.double().exp()
    if rest == "event":
        p, q = (torch.cat([t, 1 - t.sum(1, keepdim=True)], 1) for t in (p, q))
    else:
        p, q = (t / t.sum(1, keepdim=True) for t in (p, q))
    m = how.beta * q + (1 - how.beta) * p
    value = (how.forward * kl(q, p) + how.reverse * kl(p, q)).sum(1)
    value = value + how.jsd * (how.beta * kl(q, m) + (1 - how.beta) * kl(p, m)).sum(1)
    value.sum().backward()
    leaf = x.clone().requires_grad_()
    out = linear_top_k_distillation(leaf, torch.eye(300), tokens, logq, divergence=how, rest=rest)
    out.divergence.sum().backward()
    assert value.detach().median() < 2e-7
    # Log-probs are rounded to 2^-24 of themselves, and the differences that count are 3e-4.
    assert relative_error(out.divergence, value.detach()) < 3e-3
    assert relative_error(leaf.grad, exact.grad) < 1.5e-3


def test_all_of_the_teacher_in_the_tokens() -> None:
    """Log-probs that add up to 1, or to a little more: there is no other event."""
    x = torch.randn(5, 20).requires_grad_()
    tokens = torch.arange(4).expand(5, 4)
    logq = torch.randn(5, 4).log_softmax(1)
    for more in (0.0, 3e-7):
        out = linear_top_k_distillation(
            x, torch.eye(20), tokens, logq + more, divergence=Divergence(forward=1.0)
        ).divergence
        expected = (logq.exp() * (logq - x.log_softmax(1)[:, :4])).sum(1)
        torch.testing.assert_close(out, expected, rtol=3e-6, atol=3e-6)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(grad, (x.softmax(1) - torch.cat([logq.exp(), torch.zeros(5, 16)], 1)).detach())


def test_only_the_tokens_have_a_gradient_when_renormalized() -> None:
    x = torch.randn(5, 50).requires_grad_()
    tokens = torch.tensor([[4, 40, 9]] * 5)
    out = linear_top_k_distillation(
        x, torch.eye(50), tokens, torch.randn(5, 3), divergence=Divergence(reverse=1.0), rest="renormalize"
    )
    out.divergence.sum().backward()
    assert x.grad is not None
    assert (x.grad != 0).nonzero()[:, 1].unique().tolist() == [4, 9, 40]


def test_what_is_wrong_with_one_position_stays_there() -> None:
    c = case()
    tokens, logq = teacher(c, 1.0, vocab_size=VOCAB)
    logq[9, 1] = torch.nan
    x = c.hidden.detach().clone()
    x[3] = x[8] = torch.nan
    c = c.copy(hidden=x)
    out = linear_top_k_distillation(
        c.hidden, c.weight, tokens, logq, divergence=DIVERGENCES["all"], vocab_parallel=PADDED
    )
    assert out.divergence.isnan().nonzero()[:, 0].tolist() == [8, 9]
    assert out.divergence[3] == 0
    g = torch.ones(TOKENS)
    g[[8, 9]] = 0
    out.divergence.backward(g)
    assert c.hidden.grad is not None
    assert c.hidden.grad.isfinite().all()
    assert c.hidden.grad[[3, 8, 9]].eq(0).all()


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"rest": "other"}, ValueError),
        ({"divergence": 1.0}, TypeError),
        ({"teacher_logprobs": torch.zeros(TOKENS, K - 1)}, ValueError),
        ({"teacher_logprobs": torch.zeros(TOKENS, K).requires_grad_()}, ValueError),
        ({"teacher_logprobs": torch.zeros(TOKENS, K).long()}, TypeError),
    ],
)
def test_arguments_that_do_not_match(arguments: dict[str, Any], kind: type[Exception]) -> None:
    c = case()
    given: dict[str, Any] = {
        "teacher_tokens": torch.zeros(TOKENS, K).long(),
        "teacher_logprobs": torch.zeros(TOKENS, K),
        "divergence": Divergence(forward=1.0),
    }
    with pytest.raises(kind, match=r"must be|expected"):
        linear_top_k_distillation(c.hidden, c.weight, **(given | arguments))
