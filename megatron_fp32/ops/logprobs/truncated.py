"""Log-probs under a truncated sampler: renormalized over the tokens that the sampler kept.

A sampler with top-k, top-p or min-p draws from p / P, where P is the probability of the tokens that it keeps. The set
is an input here, because a set that is computed from the trainer's logits may leave out a token that the sampler has
drawn. You pass the tokens, or the threshold that the sampler used. The label is always kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logprobs.options import (
    OperatorOptions,
    inverse_temperature_of,
    operator_options,
)
from megatron_fp32.ops.logprobs.selected import apply_selected
from megatron_fp32.ops.logprobs.slots import Slots, sum_of_slots
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.logprobs.threshold import apply_threshold
from megatron_fp32.ops.products.grad_precision import GradPrecision
from megatron_fp32.ops.products.operands import check_plain
from megatron_fp32.ops.products.shard import VocabParallel


class TruncatedLogprobs(NamedTuple):
    """What `linear_truncated_logprobs` returns: float32, in the shape of the labels; 0 where a label is ignored."""

    logprobs: Tensor
    """log of the label's probability among the kept tokens."""
    entropy: Tensor
    """Of the distribution over the kept tokens, in nats."""
    mass: Tensor
    """log of the probability that the kept tokens have before they are renormalized; without a gradient. What this
    differs by between trainer and sampler is what their sets differ by."""


def linear_truncated_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    kept_tokens: Tensor | None = None,
    min_logprob: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_parallel: VocabParallel | None = None,
    logits_transform: LogitsTransform | None = None,
    ignore_index: int = -100,
    grad_precision: GradPrecision = "bf16",
    invariant: bool = False,
    chunk_size: int | None = None,
) -> TruncatedLogprobs:
    """Log-probs of the labels and entropy, renormalized over a sampler's keep set.

    Tokens that are not kept have a gradient of exactly 0.

    Takes the arguments of `linear_logprobs` that are not listed here, and one of the first two:

    Args:
        kept_tokens: [..., K], integer: the tokens that the sampler kept, in any order; `ignore_index` fills the rows
            that have fewer. A token may be there twice. The label may be missing.
        min_logprob: [...], the labels' shape: the sampler kept tokens whose log-prob is at least this, under the whole
            distribution at `temperature`. -inf keeps all. The trainer's log-probs differ a little from the sampler's,
            so pass a number between the least probable kept token and the most probable other one, as
            `linear_truncation_thresholds` returns.

    Raises:
        As `linear_logprobs`; and ValueError unless one of the two is given, in a shape that matches.
    """
    if (kept_tokens is None) == (min_logprob is None):
        raise ValueError("expected kept_tokens or min_logprob, and not both")
    check_plain(kept_tokens=kept_tokens, min_logprob=min_logprob)
    options = operator_options(
        hidden,
        weight,
        labels,
        vocab_parallel=vocab_parallel,
        logits_transform=logits_transform,
        ignore_index=ignore_index,
        grad_precision=grad_precision,
        invariant=invariant,
        chunk_size=chunk_size,
        bias=bias,
    )
    inverse_temperature = inverse_temperature_of(temperature, labels, ignore_index)
    if min_logprob is not None:
        _check_threshold(min_logprob, labels)
        return TruncatedLogprobs(
            *apply_threshold(
                hidden, weight, labels, inverse_temperature, min_logprob.reshape(-1).float(), options, bias
            )
        )
    assert kept_tokens is not None
    _check_kept(kept_tokens, labels)
    tokens = torch.cat([labels[..., None].to(kept_tokens.dtype), kept_tokens], -1)
    tokens = torch.where((labels == ignore_index)[..., None], ignore_index, tokens)
    logprobs, logits, _, rest, *_ = apply_selected(hidden, weight, labels, tokens, inverse_temperature, options, bias)
    return TruncatedLogprobs(*_eager(logits, logprobs.detach(), rest.detach(), tokens, options))


def _check_kept(kept_tokens: Tensor, labels: Tensor) -> None:
    if kept_tokens.shape[:-1] != labels.shape or kept_tokens.dim() != labels.dim() + 1:
        raise ValueError(
            f"expected kept_tokens [..., K] for labels {tuple(labels.shape)}, got {tuple(kept_tokens.shape)}"
        )
    if kept_tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"kept_tokens must be int64 or int32, got {kept_tokens.dtype}")


def _check_threshold(min_logprob: Tensor, labels: Tensor) -> None:
    if min_logprob.shape != labels.shape or min_logprob.requires_grad:
        raise ValueError(
            f"expected min_logprob without gradient and of the labels' shape {tuple(labels.shape)}, got "
            f"{tuple(min_logprob.shape)}, requires_grad={min_logprob.requires_grad}"
        )
    if not min_logprob.is_floating_point():
        raise TypeError(f"min_logprob must be floating-point, got {min_logprob.dtype}")


@torch.compiler.disable
def _eager(
    logits: Tensor, logprobs: Tensor, rest: Tensor, tokens: Tensor, options: OperatorOptions
) -> tuple[Tensor, ...]:
    return _OfKept.apply(logits, logprobs, rest, tokens, options)


class _Kept(NamedTuple):
    """The distribution over the kept tokens, the label in slot 0; float64."""

    logprob: Tensor
    """[tokens], of the label."""
    others: Tensor
    """[tokens]: 1 - p of the label."""
    p: Tensor
    """[tokens, K]; 0 in slots that do not count."""
    entropy: Tensor
    """[tokens]"""


def _kept(logits: Tensor, slots: Slots) -> _Kept:
    z = torch.where(slots.first, logits.double(), -torch.inf)
    top = z.amax(1)
    distance = z - top[:, None]
    e = distance.exp()
    e_label = e[:, 0]
    e_others = sum_of_slots(torch.cat([torch.zeros_like(e[:, :1]), e[:, 1:]], 1))
    total = e_label + e_others
    log_sum = torch.where(distance[:, 0] == 0, e_others.log1p(), total.log())
    weighted = sum_of_slots(torch.where(e == 0, 0.0, e * distance))
    logprob = torch.where(slots.known[:, 0], distance[:, 0] - log_sum, torch.nan)
    return _Kept(logprob, e_others / total, e / total[:, None], log_sum - weighted / total)


class _OfKept(torch.autograd.Function):
    """Log-prob of slot 0 among all slots, entropy and mass, from the logits of the slots.

    Autograd's own gradient would compute 1 - p as a difference.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, logprobs: Tensor, rest: Tensor, tokens: Tensor, options: OperatorOptions
    ) -> tuple[Tensor, ...]:
        shape, k = tokens.shape[:-1], tokens.shape[-1]
        flat = tokens.reshape(rest.numel(), k)
        slots = Slots.of(flat, options.softmax)
        of = _kept(logits.reshape(flat.shape), slots)
        ctx.options, ctx.shape = options, logits.shape
        ctx.save_for_backward(logits, flat)
        ctx.set_materialize_grads(False)
        of_rest = rest.reshape(-1).double()
        kept = torch.where(slots.first, logprobs.reshape(flat.shape).double(), -torch.inf)
        # Where most is kept, what is left out is exact; elsewhere what is kept.
        mass = torch.where(of_rest < -1, (-of_rest.exp()).log1p(), kept.logsumexp(1))
        ignored = slots.position_ignored
        found = [torch.where(ignored, 0.0, x).float().reshape(shape) for x in (of.logprob, of.entropy, mass)]
        ctx.mark_non_differentiable(found[2])
        return tuple(found)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, logprob: Tensor | None, entropy: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
        logits, flat = ctx.saved_tensors
        slots = Slots.of(flat, ctx.options.softmax)
        of = _kept(logits.reshape(flat.shape), slots)
        zero = torch.zeros_like(of.logprob)
        g = zero if logprob is None else logprob.reshape(-1).double()
        h = zero if entropy is None else entropy.reshape(-1).double()
        # The other slots, then the label's own.
        grad = -g[:, None] * of.p
        grad[:, 0] = g * of.others
        information = torch.where(of.p == 0, 0.0, of.p * (of.p.log() + of.entropy[:, None]))
        grad = grad - torch.where(h == 0, 0.0, h)[:, None] * information
        wrong = torch.where(~slots.known[:, 0] & (g != 0), torch.nan, 0.0)
        live = ((g != 0) | (h != 0)) & ~slots.position_ignored
        grad = torch.where(live[:, None], torch.where(slots.first, grad, 0.0) + wrong[:, None], 0.0)
        return grad.float().reshape(ctx.shape), None, None, None, None
