"""Where top-k, top-p and min-p cut the trainer's own distribution: for scoring, without a gradient."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logprobs.options import (
    inverse_temperature_of,
    operator_options,
    positions_of,
    whole_hidden,
)
from megatron_fp32.ops.logprobs.softmax import LogitsTransform, Softmax
from megatron_fp32.ops.logprobs.statistics import finish, over_ranks, stored_statistics
from megatron_fp32.ops.logprobs.tokens import stored_chunks
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.ranks import gather_first_dim
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.validation import check_count, check_finite

_POSITIONS = -100
_STEPS = 33
"""Halvings of the range of all float32 numbers until one is left."""


@torch.no_grad()
def linear_truncation_thresholds(
    hidden: Tensor,
    weight: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_parallel: VocabParallel | None = None,
    logits_transform: LogitsTransform | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """The log-prob above which top-k, top-p and min-p keep a token, [...] float32, for `linear_truncated_logprobs`.

    The filters apply in vLLM's order: first min-p, then top-k to what is left, then top-p to what is left then, its
    probabilities renormalized. Tokens with equal logits are kept together, so that there may be more than `top_k`. The
    threshold lies in the middle between the least probable kept token and the most probable other one, so that no
    rounding moves a token across it. It is -inf where all tokens are kept.

    The set is that of these hidden states and weights. A sampler that computes with others may have kept other tokens:
    pass its own set, where you have it.

    Takes the arguments of `linear_logprobs` that are not listed here, and:

    Args:
        hidden: [..., hidden], as for `linear_logprobs`.
        weight: [vocab / tp, hidden], as for `linear_logprobs`.
        top_k: keep the most probable tokens, so many.
        top_p: keep the smallest number of most probable tokens whose probabilities add up to at least this.
        min_p: keep the tokens whose probability is at least so many times the largest one.
        mask: [...] bool: the positions that count; None for all. The others get 0.

    Raises:
        As `linear_logprobs`; and ValueError for a `top_p` or `min_p` that is not above 0 and at most 1.
    """
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None:
            check_finite(name, value, positive=True)
            if value > 1:
                raise ValueError(f"{name} must be at most 1, got {value}")
    if top_k is not None:
        check_count("top_k", top_k, least=1)
    positions = positions_of(hidden, mask, vocab_parallel, _POSITIONS)
    options = operator_options(
        hidden,
        weight,
        positions,
        vocab_parallel=vocab_parallel,
        logits_transform=logits_transform,
        ignore_index=_POSITIONS,
        grad_precision="bf16",
        invariant=False,
        chunk_size=chunk_size,
        top_k=top_k or 0,
        bias=bias,
    )
    inverse = inverse_temperature_of(temperature, positions, _POSITIONS)
    flat = positions.reshape(-1)
    x = whole_hidden(hidden, weight, flat, options)
    found = [
        _thresholds(logits_product(x[rows], weight, bias), inverse[rows], options.softmax, top_k, top_p, min_p)
        for rows in stored_chunks(len(x), weight, options, 24 * weight.shape[0])
    ]
    return torch.where(flat == _POSITIONS, 0.0, torch.cat(found)).reshape(positions.shape)


def _thresholds(
    raw: Tensor, inverse: Tensor, softmax: Softmax, top_k: int | None, top_p: float | None, min_p: float | None
) -> Tensor:
    """[tokens], of products [tokens, columns]."""
    no_label = torch.full_like(inverse, -1, dtype=torch.int64)
    statistics, logits = stored_statistics(raw, no_label.int(), inverse, softmax, mean="none")
    of = finish(*over_ranks(statistics, logits, softmax), no_label, softmax)
    z = softmax.finished_logits(raw, inverse)
    z[:, softmax.shard.valid_columns :] = -torch.inf
    cut = torch.full_like(inverse, -torch.inf)
    if min_p is not None:
        cut = of.top + math.log(min_p)
    if top_k is not None:
        # Where min-p has left fewer, it stays.
        cut = cut.maximum(_largest_cut(z, z.new_ones(1, 1), torch.full_like(cut, top_k).double(), softmax))
    if top_p is not None:
        e = torch.where(z < cut[:, None], 0.0, (z - of.top[:, None]).exp())
        cut = cut.maximum(_largest_cut(z, e, top_p * _sum(e, softmax), softmax))
    below = z < cut[:, None]
    least = _over_ranks(torch.where(below, torch.inf, z).amin(1), softmax, dist.ReduceOp.MIN)
    other = _over_ranks(torch.where(below, z, -torch.inf).amax(1), softmax, dist.ReduceOp.MAX)
    least, other = ((v - of.top) - of.log_sum for v in (least, other))
    # A NaN among the logits makes it NaN.
    return torch.where(other.isneginf(), other, (least + other) / 2) + (of.log_sum - of.log_sum)


def _largest_cut(z: Tensor, measures: Tensor, target: Tensor, softmax: Softmax) -> Tensor:
    """[tokens] float32: the largest number for which the measures of the logits not below it add up to the target.

    Args:
        z: [tokens, columns] float32, logits.
        measures: [tokens, columns] float32, not negative, or [1, 1] for one number.
        target: [tokens] float64.
        softmax: for the ranks.
    """
    low = torch.full_like(target, -(2**31), dtype=torch.int64)
    high, order = torch.full_like(low, 2**31 - 1), _ordered(z)
    for _ in range(_STEPS):
        middle = (low + high + 1) >> 1
        enough = _sum(torch.where(order >= middle[:, None], measures, 0.0), softmax) >= target
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle - 1)
    bits = torch.where(low < 0, low ^ 0x7FFFFFFF, low).int()
    return bits.view(torch.float32)


def _ordered(z: Tensor) -> Tensor:
    """Integers in the order of float32 numbers."""
    bits = (z + 0.0).view(torch.int32)  # not -0
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _sum(x: Tensor, softmax: Softmax) -> Tensor:
    """[tokens] float64, over the columns of all ranks."""
    mine = x.sum(1, dtype=torch.float64)
    if softmax.shard.group is None:
        return mine
    return gather_first_dim(mine[None], softmax.shard.group).sum(0)


def _over_ranks(x: Tensor, softmax: Softmax, op: dist.ReduceOp.RedOpType) -> Tensor:
    if softmax.shard.group is not None:
        dist.all_reduce(x, op=op, group=softmax.shard.group)
    return x
