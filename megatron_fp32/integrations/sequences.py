"""Next-token targets and log-probs of sequences, packed or not, whole or cut over context-parallel ranks.

Megatron cuts a sequence into `2 * cp` parts of one length. Rank r has part r and part 2 * cp - r - 1, in this order.
The positions are computed on the device, so the host does not wait for the lengths.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.products.ranks import gather_first_dim


def whole_positions(length: int, ranks: int, device: torch.device) -> Tensor:
    """[ranks, length / ranks]: where in a sequence each rank's tokens are.

    Raises:
        ValueError: for a length that is not a multiple of `2 * ranks`, where there are several.
    """
    if ranks > 1 and length % (2 * ranks) != 0:
        raise ValueError(f"expected a multiple of {2 * ranks} tokens over {ranks} context-parallel ranks, got {length}")
    return packed_positions(torch.arange(2, device=device) * length, length, ranks)


def packed_positions(boundaries: Tensor, tokens: int, ranks: int) -> Tensor:
    """[ranks, tokens / ranks]: where in the pack each rank's tokens are; `tokens` for those of no sequence.

    Args:
        boundaries: [sequences + 1], where each sequence begins and the last one ends; multiples of `2 * ranks`.
        tokens: in the pack.
        ranks: how many context-parallel ranks.
    """
    boundaries = boundaries.long()
    local = torch.arange(tokens // ranks, device=boundaries.device)
    sequence = sequence_of(boundaries // ranks, local)
    begin, end = boundaries[sequence], boundaries[sequence + 1]
    part = (end - begin) // (2 * ranks)
    offset = local - begin // ranks
    rank = torch.arange(ranks, device=boundaries.device)[:, None]
    shift = torch.where(offset < part, rank, 2 * ranks - rank - 2) * part
    position = begin + shift + offset
    return torch.where(offset < end // ranks - begin // ranks, position, tokens) if ranks > 1 else local[None]


def sequence_of(boundaries: Tensor, positions: Tensor) -> Tensor:
    """Which sequence each position is in; the last one for positions beyond."""
    return torch.searchsorted(boundaries[1:].contiguous(), positions, right=True).clamp(max=len(boundaries) - 2)


def next_tokens(tokens: Tensor, boundaries: Tensor) -> Tensor:
    """[tokens] of a pack: the token after each one; the first token of its sequence for the last one.

    Args:
        tokens: [tokens].
        boundaries: [sequences + 1].
    """
    boundaries = boundaries.long()
    position = torch.arange(len(tokens), device=tokens.device)
    sequence = sequence_of(boundaries, position)
    begin, end = boundaries[sequence], boundaries[sequence + 1]
    following = torch.where(position + 1 < end, position + 1, begin)
    return tokens[torch.where(position < end, following, position)]


def unpacked(values: Tensor, boundaries: Tensor, length: int) -> Tensor:
    """[sequences, length]: each sequence's values without its last one, and zeros after them.

    Args:
        values: [tokens] of a pack.
        boundaries: [sequences + 1].
        length: of the rows; what does not fit is left out.
    """
    boundaries = boundaries.long()
    place = torch.arange(length, device=values.device)
    inside = place < (boundaries[1:] - boundaries[:-1] - 1)[:, None]
    if len(values) == 0:
        return values.new_zeros(len(boundaries) - 1, length)
    picked = values[torch.where(inside, boundaries[:-1, None] + place, 0)]
    return torch.where(inside, picked, 0.0)


def gather_sequence(local: Tensor, positions: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[rows, tokens] of every rank's [rows, tokens / ranks]; zeros where no rank has a token.

    Its gradient is the sum of all ranks' gradients, in the order of the ranks.

    Args:
        local: this rank's values.
        positions: [ranks, tokens / ranks], from `packed_positions`.
        group: the context-parallel ranks.
    """
    rows, tokens = len(local), positions.numel()
    every = _GatherOverRanks.apply(local, group).transpose(0, 1).reshape(rows, tokens)
    # One place more, for tokens of no sequence.
    room = every.new_zeros(rows, tokens + 1)
    return room.scatter(1, positions.reshape(1, -1).expand(rows, -1), every)[:, :tokens]


class _GatherOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather_first_dim(local[None], group)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        ranks = dist.get_world_size(ctx.group)
        every = gather_first_dim(upstream.contiguous(), ctx.group).view(ranks, *upstream.shape)
        return every[:, dist.get_rank(ctx.group)].sum(0), None
