"""Cross entropy of the output layer without its logits, label smoothing and z-loss included.

With log p and logsumexp of `linear_logprobs`, epsilon the label smoothing, and K the size of the vocabulary:

    loss = -(1 - epsilon) log p[label] + epsilon (logsumexp - mean logit) + z_loss * logsumexp^2

The smoothing is that of `torch.nn.functional.cross_entropy`: the label's target is 1 - epsilon + epsilon / K.
Megatron's `vocab_parallel_cross_entropy` spreads epsilon over the other K - 1: pass epsilon K / (K - 1) for that.
The z-loss is that of PaLM (arXiv 2204.02311, section 5).
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.config import GradPrecision
from megatron_fp32.ops.logprobs.autograd import Backward, linear_logprobs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLoss:
    """The loss as a function of token statistics."""

    label_smoothing: float
    z_loss: float

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {self.label_smoothing}")
        if not self.z_loss >= 0:
            raise ValueError(f"z_loss must not be negative, got {self.z_loss}")

    def __call__(self, logprobs: Tensor, logsumexp: Tensor, mean_logit: Tensor | None, ignored: Tensor) -> Tensor:
        """Loss of every token, all arguments [...]; 0 where it is ignored."""
        loss = -(1 - self.label_smoothing) * logprobs
        if self.label_smoothing > 0:
            assert mean_logit is not None
            loss = loss + self.label_smoothing * (logsumexp - mean_logit)
        if self.z_loss > 0:
            loss = loss + self.z_loss * logsumexp.square()
        return torch.where(ignored, 0.0, loss)

    def gradients(self, weights: Tensor, logsumexp: Tensor) -> dict[str, Tensor | None]:
        """Of `weights * loss` with respect to the three; `weights` are 0 where the label is ignored."""
        smooth = self.label_smoothing * weights if self.label_smoothing > 0 else None
        of_logsumexp = smooth
        if self.z_loss > 0:
            z = 2 * self.z_loss * logsumexp * weights
            of_logsumexp = z if smooth is None else z + smooth
        return {
            "logprob": -(1 - self.label_smoothing) * weights,
            "entropy": None,
            "logsumexp": of_logsumexp,
            "mean_logit": None if smooth is None else -smooth,
        }


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    reduce_hidden_grad: bool = True,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    grad_precision: GradPrecision = "bf16",
    backward: Backward = "recompute",
    invariant: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """Loss of every token, in fp32 and the shape of the labels; 0 where they are ignored.

    Arguments are those of `linear_logprobs`, and:

    Args:
        label_smoothing: 0 or more and less than 1; see the module for its definition.
        z_loss: coefficient of the squared logsumexp.

    Raises:
        As `linear_logprobs`; and ValueError for values that these two do not allow.
    """
    loss = TokenLoss(label_smoothing=label_smoothing, z_loss=z_loss)
    result = linear_logprobs(
        hidden,
        weight,
        labels,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        reduce_hidden_grad=reduce_hidden_grad,
        vocab_size=vocab_size,
        temperature=temperature,
        scale=scale,
        softcap=softcap,
        ignore_index=ignore_index,
        grad_precision=grad_precision,
        backward=backward,
        invariant=invariant,
        mean_logit=label_smoothing > 0,
        chunk_size=chunk_size,
    )
    return loss(result.logprobs, result.logsumexp, result.mean_logit, labels == ignore_index)
