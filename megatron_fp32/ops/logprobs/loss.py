"""Cross entropy of the output layer without its logits, label smoothing and z-loss included.

With log p and logsumexp of `linear_logprobs`, epsilon the label smoothing, and K the size of the vocabulary:

    loss = -(1 - epsilon) log p[label] - epsilon (mean of log p over the vocabulary) + z_loss * logsumexp^2

The smoothing is defined as in `torch.nn.functional.cross_entropy`: the label's target is 1 - epsilon + epsilon / K.
Megatron's `vocab_parallel_cross_entropy` spreads epsilon over the other K - 1: pass epsilon K / (K - 1) for that.
The z-loss is defined as in PaLM (arXiv 2204.02311, section 5).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logprobs.autograd import apply_logprobs
from megatron_fp32.ops.logprobs.options import Backward, inverse_temperature_of, operator_options
from megatron_fp32.ops.logprobs.passes import Results
from megatron_fp32.ops.logprobs.reduction import Reduction, ReductionName
from megatron_fp32.ops.logprobs.softmax import LogitsTransform, Mean
from megatron_fp32.ops.products.grad_precision import GradPrecision
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.ops.traced import is_traced
from megatron_fp32.validation import check_finite, check_flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss as a function of token statistics."""

    label_smoothing: float
    z_loss: float

    def __post_init__(self) -> None:
        check_finite("label_smoothing", self.label_smoothing)
        check_finite("z_loss", self.z_loss)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing}")
        if self.z_loss < 0:
            raise ValueError(f"z_loss must not be negative, got {self.z_loss}")

    @property
    def mean(self) -> Mean:
        """What must be averaged over the vocabulary for it."""
        return "logprob" if self.label_smoothing > 0 else "none"

    def __call__(self, logprobs: Tensor, logsumexp: Tensor, mean_logprob: Tensor | None) -> Tensor:
        """Loss of every token, all arguments [...]; 0 where they are."""
        loss = -(1 - self.label_smoothing) * logprobs
        if self.label_smoothing > 0:
            assert mean_logprob is not None
            loss = loss - self.label_smoothing * mean_logprob
        if self.z_loss > 0:
            loss = loss + self.share_of_z(logsumexp)
        # Not -0.
        return loss + 0.0

    def share_of_z(self, logsumexp: Tensor) -> Tensor:
        """What the z-loss adds to the loss of every token."""
        return self.z_loss * logsumexp.square() if self.z_loss > 0 else torch.zeros_like(logsumexp)

    def gradients(self, weights: Tensor, logsumexp: Tensor) -> dict[str, Tensor | None]:
        """Of `weights * loss` with respect to the three; 0 where the weight is, whatever the logsumexp is."""
        z = 2 * self.z_loss * logsumexp * weights if self.z_loss > 0 else None
        return {
            "logprob": -(1 - self.label_smoothing) * weights,
            "entropy": None,
            "logsumexp": None if z is None else torch.where(weights == 0, 0.0, z),
            "mean": -self.label_smoothing * weights if self.label_smoothing > 0 else None,
        }


class LossWithMetrics(NamedTuple):
    """What `linear_cross_entropy` returns with `with_metrics=True`; `z_loss` and `correct` have the labels' shape.

    A token whose label is ignored has 0 and False.
    """

    loss: Tensor
    """As without the metrics: float32, in the shape of the labels or [] by the reduction."""
    z_loss: Tensor
    """float32, without a gradient: what the z-loss adds to the loss of every token, whatever the reduction is."""
    correct: Tensor
    """bool: no other logit is larger than the label's, and none is NaN. A label that shares the largest logit counts as
    correct, on any number of ranks."""


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    vocab_parallel: VocabParallel | None = ...,
    logits_transform: LogitsTransform | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    grad_precision: GradPrecision = ...,
    backward: Backward = ...,
    reduction: ReductionName = ...,
    reduction_group: dist.ProcessGroup | None = ...,
    invariant: bool = ...,
    chunk_size: int | None = ...,
    with_metrics: Literal[False] = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = ...,
    temperature: float | Tensor = ...,
    vocab_parallel: VocabParallel | None = ...,
    logits_transform: LogitsTransform | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    grad_precision: GradPrecision = ...,
    backward: Backward = ...,
    reduction: ReductionName = ...,
    reduction_group: dist.ProcessGroup | None = ...,
    invariant: bool = ...,
    chunk_size: int | None = ...,
    with_metrics: Literal[True],
) -> LossWithMetrics: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_parallel: VocabParallel | None = None,
    logits_transform: LogitsTransform | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    grad_precision: GradPrecision = "bf16",
    backward: Backward = "recompute",
    reduction: ReductionName = "none",
    reduction_group: dist.ProcessGroup | None = None,
    invariant: bool = False,
    chunk_size: int | None = None,
    with_metrics: bool = False,
) -> Tensor | LossWithMetrics:
    """Loss of every token, in fp32 and the shape of the labels; 0 where they are ignored. Or their sum or mean.

    With `reduction="mean"` the sum of the losses is divided by the number of valid tokens, which are those whose label
    is not ignored. With a `reduction_group` it is divided by the number of valid tokens of all of its ranks: each rank
    returns its share of the mean over all of them, and the sum of the shares is that mean. The gradient is the
    gradient of the share, so gradients that are summed over the ranks, not averaged, are the gradients of the mean over
    all tokens. Every rank of the group must make the call. Without a valid token the mean and its gradients are 0.

    Takes the arguments of `linear_logprobs` except `mean_logit` and `top_k`, and:

    Args:
        label_smoothing: 0 or more and less than 1; see the module for its definition.
        z_loss: coefficient of the squared logsumexp.
        reduction: `"none"`, or `"sum"` or `"mean"` for one number [] of all tokens, which is summed in float64.
        reduction_group: ranks with other tokens, whose valid tokens a mean is divided by: data-parallel,
            context-parallel, or both. None for this rank alone.
        with_metrics: return `LossWithMetrics`.

    Raises:
        As `linear_logprobs`; and ValueError for values that these arguments do not allow, TypeError for a
        `reduction_group` that is not a ProcessGroup.
    """
    loss = TokenLoss(label_smoothing=label_smoothing, z_loss=z_loss)
    reduce = Reduction(name=reduction, group=reduction_group)
    reduce.check_other_ranks(vocab_parallel)
    check_flag("with_metrics", with_metrics)
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
        backward=backward,
        mean=loss.mean,
        correct=with_metrics,
        bias=bias,
    )
    inverse_temperature = inverse_temperature_of(temperature, labels, ignore_index)
    found = apply_logprobs(hidden, weight, labels, inverse_temperature, options, bias)
    losses = _losses(found, loss)
    reduced = reduce.of(losses, labels, ignore_index)
    if not with_metrics:
        return reduced
    assert found.correct is not None
    return LossWithMetrics(loss=reduced, z_loss=loss.share_of_z(found.logsumexp.detach()), correct=found.correct)


def _losses(found: Results, loss: TokenLoss) -> Tensor:
    if is_traced(found.logprobs):
        return token_losses(found.logprobs, found.logsumexp, found.mean, loss.label_smoothing, loss.z_loss)
    return _LossOfTokens.apply(found.logprobs, found.logsumexp, found.mean, loss)


class _LossOfTokens(torch.autograd.Function):
    """`TokenLoss` with its own gradient: autograd's would multiply a gradient of 0 by a NaN."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, logsumexp: Tensor, mean: Tensor | None, loss: TokenLoss) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(logsumexp)
        return loss(logprobs, logsumexp, mean)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.loss.gradients(upstream, *ctx.saved_tensors)
        return grads["logprob"], grads["logsumexp"], grads["mean"], None


@torch.library.custom_op("megatron_fp32::token_losses", mutates_args=())
def token_losses(
    logprobs: Tensor, logsumexp: Tensor, mean_logprob: Tensor | None, label_smoothing: float, z_loss: float
) -> Tensor:
    """`TokenLoss` as an operator that FakeTensor and `torch.compile` know."""
    return TokenLoss(label_smoothing=label_smoothing, z_loss=z_loss)(logprobs, logsumexp, mean_logprob)


@token_losses.register_fake
def _(
    logprobs: Tensor, logsumexp: Tensor, mean_logprob: Tensor | None, label_smoothing: float, z_loss: float
) -> Tensor:
    return torch.empty_like(logprobs)


@torch.library.custom_op("megatron_fp32::token_losses_backward", mutates_args=())
def _token_losses_backward(upstream: Tensor, logsumexp: Tensor, label_smoothing: float, z_loss: float) -> list[Tensor]:
    grads = TokenLoss(label_smoothing=label_smoothing, z_loss=z_loss).gradients(upstream, logsumexp)
    return [grad.clone() for grad in grads.values() if grad is not None]


@_token_losses_backward.register_fake
def _(upstream: Tensor, logsumexp: Tensor, label_smoothing: float, z_loss: float) -> list[Tensor]:
    return [torch.empty_like(logsumexp) for _ in range(1 + (z_loss > 0) + (label_smoothing > 0))]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, logsumexp, _, ctx.label_smoothing, ctx.z_loss = inputs
    ctx.save_for_backward(logsumexp)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    (logsumexp,) = ctx.saved_tensors
    found = iter(_token_losses_backward(upstream, logsumexp, ctx.label_smoothing, ctx.z_loss))
    of_logprobs = next(found)
    of_logsumexp = next(found) if ctx.z_loss > 0 else None
    of_mean = next(found) if ctx.label_smoothing > 0 else None
    return of_logprobs, of_logsumexp, of_mean, None, None


token_losses.register_autograd(_backward, setup_context=_setup)
