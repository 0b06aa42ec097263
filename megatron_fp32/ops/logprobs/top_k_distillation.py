"""`linear_top_k_distillation`: divergence from a teacher of whom only some tokens' log-probs are known.

Teachers that run elsewhere send their top-k. What is known is a distribution over K + 1 events: the tokens, and that it
was another token. `divergence.py` has the formulas; here they are sums over events, in float64.

The gradient with respect to log p of the events is only determined up to multiples of p, because the p add up to 1. The
choice here is the one that adds up to 0: that of KL(q || p) is p - q, and loses no digits where p is close to q.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logprobs.divergence import Divergence, divergence_terms, finish, log_ratio_of_mixture
from megatron_fp32.ops.logprobs.selected import SelectedLogprobs, linear_selected_logprobs
from megatron_fp32.ops.logprobs.slots import sum_of_slots
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.products.grad_precision import GradPrecision
from megatron_fp32.ops.products.operands import check_plain
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.validation import check_choice

Rest = Literal["event", "renormalize", "drop"]
"""What becomes of the tokens that the teacher did not send."""


class TopKDistillation(NamedTuple):
    """What `linear_top_k_distillation` returns: float32; 0 for positions whose tokens are all ignored."""

    divergence: Tensor
    """[...], in nats."""
    logprobs: Tensor
    """[..., K]: the student's log-probs of the tokens, without a gradient."""
    rest: Tensor
    """[...]: log of the student's probability of all other tokens, without a gradient."""
    entropy: Tensor
    """[...]: of the student's whole distribution, with a gradient."""


def linear_top_k_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_tokens: Tensor,
    teacher_logprobs: Tensor,
    *,
    divergence: Divergence,
    rest: Rest = "event",
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_parallel: VocabParallel | None = None,
    logits_transform: LogitsTransform | None = None,
    ignore_index: int = -100,
    grad_precision: GradPrecision = "bf16",
    invariant: bool = False,
    chunk_size: int | None = None,
) -> TopKDistillation:
    """Divergence of the student from a teacher whose log-probs of K tokens are given.

    Takes the arguments of `linear_logprobs` that are not listed here, and:

    Args:
        hidden: [..., hidden], as for `linear_logprobs`.
        weight: [vocab / tp, hidden], as for `linear_logprobs`.
        teacher_tokens: [..., K], integer; different tokens in each position, `ignore_index` in slots without one.
        teacher_logprobs: [..., K], floating-point: log q of the tokens under the teacher's whole distribution, at the
            teacher's temperature. What they lack to a sum of 1 is the probability of all other tokens.
        divergence: what to compute of the two distributions.
        rest: "event" compares the probabilities of all other tokens, too, as those of one event. "renormalize" compares
            the distributions over the K tokens alone: all other logits have a gradient of exactly 0. "drop" sums the
            terms of the K tokens and leaves the others' out, which is not a divergence: it can be negative, and for
            KL(q || p) it is the cross entropy on the teacher's tokens less a constant.
        temperature: the student's logits are divided by it.
        ignore_index: marks slots without a token.

    Raises:
        As `linear_logprobs`; and ValueError for `teacher_logprobs` of another shape, or that require a gradient.
    """
    check_choice("rest", rest, get_args(Rest))
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be a Divergence, got {divergence!r}")
    check_plain(teacher_logprobs=teacher_logprobs)
    if teacher_logprobs.shape != teacher_tokens.shape or teacher_logprobs.requires_grad:
        raise ValueError(
            "expected teacher_logprobs without gradient and of the shape of teacher_tokens "
            f"{tuple(teacher_tokens.shape)}, got {tuple(teacher_logprobs.shape)}, "
            f"requires_grad={teacher_logprobs.requires_grad}"
        )
    if not teacher_logprobs.is_floating_point():
        raise TypeError(f"teacher_logprobs must be floating-point, got {teacher_logprobs.dtype}")
    of = linear_selected_logprobs(
        hidden,
        weight,
        teacher_tokens,
        temperature=temperature,
        vocab_parallel=vocab_parallel,
        logits_transform=logits_transform,
        ignore_index=ignore_index,
        grad_precision=grad_precision,
        invariant=invariant,
        chunk_size=chunk_size,
        bias=bias,
    )
    value = _eager(of, teacher_logprobs, teacher_tokens == ignore_index, divergence, rest)
    return TopKDistillation(value, of.logprobs.detach(), of.rest.detach(), of.entropy)


@torch.compiler.disable
def _eager(of: SelectedLogprobs, teacher_logprobs: Tensor, empty: Tensor, divergence: Divergence, rest: Rest) -> Tensor:
    return _Divergence.apply(of.logprobs, of.logits, of.rest, teacher_logprobs, empty, divergence, rest)


class _Events(NamedTuple):
    """Log-probs [tokens, events] of the student and the teacher, float64; -inf for events that do not count."""

    log_p: Tensor
    log_q: Tensor

    @property
    def difference(self) -> Tensor:
        """log q - log p; 0 where both are impossible."""
        neither = self.log_p.isneginf() & self.log_q.isneginf()
        return torch.where(neither, 0.0, self.log_q - self.log_p)


def _events(logprobs: Tensor, logits: Tensor, rest: Tensor, teacher: Tensor, empty: Tensor, mode: Rest) -> _Events:
    """All [..., K], `rest` [...]."""
    flat = (rest.numel(), empty.shape[-1])
    empty, teacher = empty.reshape(flat), teacher.reshape(flat).double()
    log_q = torch.where(empty, -torch.inf, teacher)
    if mode == "renormalize":
        z = torch.where(empty, -torch.inf, logits.reshape(flat).double())
        return _Events(_renormalized(z), _renormalized(log_q))
    log_p = torch.where(empty, -torch.inf, logprobs.reshape(flat).double())
    if mode == "drop":
        return _Events(log_p, log_q)
    # A teacher's rounded log-probs may add up to more than 1.
    known = sum_of_slots(log_q.exp())
    other = torch.where(known < 1, (-known).log1p(), torch.where(known.isnan(), torch.nan, -torch.inf))
    nothing = empty.all(1)
    other, own = (torch.where(nothing, -torch.inf, x) for x in (other, rest.reshape(-1).double()))
    return _Events(torch.cat([log_p, own[:, None]], 1), torch.cat([log_q, other[:, None]], 1))


def _renormalized(x: Tensor) -> Tensor:
    top = x.amax(1, keepdim=True)
    top = torch.where(top.isneginf(), 0.0, top)
    return x - (top + sum_of_slots((x - top).exp())[:, None].log())


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        logits: Tensor,
        rest: Tensor,
        teacher: Tensor,
        empty: Tensor,
        divergence: Divergence,
        mode: Rest,
    ) -> Tensor:
        ctx.divergence, ctx.mode = divergence, mode
        ctx.save_for_backward(logprobs, logits, rest, teacher, empty)
        events = _events(logprobs, logits, rest, teacher, empty, mode)
        log_p, log_q = events
        if mode == "drop":
            value = _dropped(events, divergence)
        else:
            sums = [sum_of_slots(term) for term in divergence_terms(log_p, log_q, events.difference, divergence)]
            _, value, _, _ = finish(torch.stack(sums), divergence)
        ignored = empty.reshape(len(log_p), -1).all(1)
        return torch.where(ignored, 0.0, value).float().reshape(rest.shape)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        logprobs, logits, rest, teacher, empty = ctx.saved_tensors
        events = _events(logprobs, logits, rest, teacher, empty, ctx.mode)
        g = upstream.reshape(-1).double()[:, None]
        slope = _slope(events, ctx.divergence, drop=ctx.mode == "drop")
        live = (g != 0) & ~empty.reshape(len(g), -1).all(1)[:, None]
        grad = torch.where(live, g * slope, 0.0).float()
        of_slots = grad[:, : logprobs.shape[-1]].reshape(logprobs.shape)
        of_slots = of_slots.masked_fill(empty, 0.0)
        if ctx.mode == "renormalize":
            return None, of_slots, *([None] * 5)
        of_rest = grad[:, -1].reshape(rest.shape) if ctx.mode == "event" else None
        return of_slots, None, of_rest, *([None] * 4)


def _slope(events: _Events, divergence: Divergence, *, drop: bool) -> Tensor:
    """d divergence / d log p of every event, [tokens, events], up to a multiple of p; with `drop`, exactly that."""
    log_p, log_q = events
    p, q, d = log_p.exp(), log_q.exp(), events.difference
    slope = torch.zeros_like(p)
    if divergence.forward > 0:
        near = q * torch.expm1(-d.clamp(-1, 1))
        slope = slope + divergence.forward * (-q if drop else torch.where(d.abs() < 1, near, p - q))
    if divergence.reverse > 0:
        term = torch.where(p == 0, 0.0, -p * d)
        slope = slope + divergence.reverse * (term + p if drop else term - p * sum_of_slots(term)[:, None])
    if divergence.jsd > 0:
        beta = divergence.beta
        term = torch.where(p == 0, 0.0, -p * log_ratio_of_mixture(d, beta, 1 - beta))
        slope = slope + divergence.jsd * (1 - beta) * (term if drop else term - p * sum_of_slots(term)[:, None])
    return slope


def _dropped(events: _Events, divergence: Divergence) -> Tensor:
    """[tokens]: the sums of q log(q / p) and the like over the events that there are."""
    log_p, log_q = events
    p, q, d = log_p.exp(), log_q.exp(), events.difference
    value = torch.zeros_like(p[:, 0])
    if divergence.forward > 0:
        value = value + divergence.forward * sum_of_slots(torch.where(q == 0, 0.0, q * d))
    if divergence.reverse > 0:
        value = value - divergence.reverse * sum_of_slots(torch.where(p == 0, 0.0, p * d))
    if divergence.jsd > 0:
        beta = divergence.beta
        of_teacher = torch.where(q == 0, 0.0, -q * log_ratio_of_mixture(-d, 1 - beta, beta))
        of_student = torch.where(p == 0, 0.0, -p * log_ratio_of_mixture(d, beta, 1 - beta))
        value = value + divergence.jsd * sum_of_slots(beta * of_teacher + (1 - beta) * of_student)
    return value
