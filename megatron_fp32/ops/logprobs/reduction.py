"""The losses of tokens as one number: their sum, or their mean over the tokens that have a label.

The sum is a fixed tree in float64: the order of summation depends on the number of tokens alone, and the result is
rounded once. The number of tokens stays on the device, so the host does not wait for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.ops.traced import is_traced
from megatron_fp32.validation import check_choice

ReductionName = Literal["none", "sum", "mean"]
"""What becomes of the losses of tokens."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reduction:
    """How losses are reduced.

    Raises:
        TypeError: on construction, for a group that is not a ProcessGroup.
        ValueError: on construction, for an unknown name, or a group without `"mean"`.
    """

    name: ReductionName
    """Nothing, the sum, or the mean over the valid tokens."""
    group: dist.ProcessGroup | None = None
    """The ranks whose valid tokens are counted; None for this one."""

    def __post_init__(self) -> None:
        check_choice("reduction", self.name, get_args(ReductionName))
        if self.group is None:
            return
        if not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(f"reduction_group must be a torch.distributed.ProcessGroup or None, got {self.group!r}")
        if self.name != "mean":
            raise ValueError(
                f"reduction_group counts the tokens of a mean: expected reduction='mean', got {self.name!r}"
            )

    def check_other_ranks(self, vocab_parallel: VocabParallel | None) -> None:
        """Raise ValueError if the group is the tensor-parallel one, whose ranks would count each token again."""
        if self.group is not None and vocab_parallel is not None and vocab_parallel.group is self.group:
            raise ValueError(
                "reduction_group must be ranks with other tokens, such as the data-parallel or context-parallel ranks, "
                "got vocab_parallel.group, whose ranks have the same tokens"
            )

    def of(self, losses: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """[] float32 of losses [...], or the losses themselves; differentiable.

        Args:
            losses: float32, in the shape of the labels; 0 where a label is ignored.
            labels: [...].
            ignore_index: label of tokens without one.
        """
        if self.name == "none":
            return losses
        valid = labels != ignore_index
        if self.name == "sum":
            return _reduced(losses, valid, None)
        count = valid.sum()
        if self.group is not None:
            dist.all_reduce(count, group=self.group)
        # Without a valid token the sum is 0, and so is the mean.
        return _reduced(losses, valid, count.clamp(min=1))


def _reduced(losses: Tensor, valid: Tensor, count: Tensor | None) -> Tensor:
    if is_traced(losses):
        # The losses' own operator leaves out the gradient of tokens that are not valid.
        return _quotient(losses, count)
    return _Reduced.apply(losses, valid, count)


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: Tensor, valid: Tensor, count: Tensor | None) -> Tensor:
        ctx.save_for_backward(valid, count)
        return _quotient(losses, count)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        valid, count = ctx.saved_tensors
        each = upstream if count is None else (upstream.double() / count).float()
        return torch.where(valid, each, 0.0), None, None


def _quotient(losses: Tensor, count: Tensor | None) -> Tensor:
    total = tree_sum(losses.reshape(-1).double())
    return (total if count is None else total / count).float()


def tree_sum(x: Tensor) -> Tensor:
    """[] sum of `x` [n], half added to half again and again: the order of summation depends on n alone."""
    if len(x) == 0:
        return x.new_zeros(())
    while len(x) > 1:
        half = len(x) // 2
        pairs = x[:half] + x[half : 2 * half]
        x = torch.cat([pairs, x[2 * half :]]) if len(x) % 2 else pairs
    return x[0]
