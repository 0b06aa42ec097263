"""The most probable tokens, from logits that are there for a moment.

A token among the k largest lies in one of the k blocks with the largest maxima, which the statistics know already: only
those blocks are looked at. Equal logits go by their index, on every number of ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs.softmax import Softmax
from megatron_fp32.ops.logprobs.statistics import KeptLogits, TokenStatistics
from megatron_fp32.ops.products.ranks import gather_first_dim
from megatron_fp32.ops.products.shard import BLOCK


def bytes_of_a_token(columns: int, k: int) -> int:
    """What `top_k_of` has in memory at most for one token: its logits, and the candidates with their sorted copies."""
    blocks = -(-columns // BLOCK)
    return 4 * columns + 24 * blocks + _BYTES_OF_A_CANDIDATE * BLOCK * min(k, blocks)


_BYTES_OF_A_CANDIDATE = 48
"""An index of 8 bytes, a logit, the sort's copies of both, its workspace, and what is freed in between."""


def top_k_of(
    kept: KeptLogits, labels: Tensor, inverse_temperature: Tensor, statistics: TokenStatistics, softmax: Softmax, k: int
) -> tuple[Tensor, Tensor]:
    """Log-probabilities [tokens, k] float32, largest first, and indices [tokens, k] int64 into the whole vocabulary.

    Zeros and -1 for a token whose label is ignored.

    Args:
        kept: the products of the tokens, with `tops`.
        labels: [tokens], indices into the whole vocabulary.
        inverse_temperature: [tokens] float32.
        statistics: of the tokens.
        softmax: over the vocabulary, with this rank's columns.
        k: 1 to the size of the vocabulary.
    """
    assert kept.tops is not None
    tokens, columns = kept.values.shape
    order = kept.tops.t().sort(dim=1, descending=True, stable=True).indices
    # Ascending, so that a stable sort of the candidates keeps the smaller index first.
    blocks = order[:, : min(k, order.shape[1])].sort(1).values
    candidates = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)).flatten(1)
    raw = kept.values.gather(1, candidates.clamp(max=columns - 1))
    z = softmax.logits(raw, inverse_temperature).masked_fill(candidates >= softmax.shard.valid_columns, -torch.inf)
    values, places = z.sort(dim=1, descending=True, stable=True)
    values, indices = values[:, :k], candidates.gather(1, places[:, :k]) + softmax.shard.first_column
    if values.shape[1] < k:
        missing = (tokens, k - values.shape[1])
        values = torch.cat([values, values.new_full(missing, -torch.inf)], 1)
        indices = torch.cat([indices, indices.new_full(missing, -1)], 1)
    if softmax.shard.group is not None:
        values, indices = (
            gather_first_dim(x, softmax.shard.group).view(softmax.shard.ranks, tokens, k).transpose(0, 1).flatten(1)
            for x in (values, indices)
        )
        values, places = values.sort(dim=1, descending=True, stable=True)
        values, indices = values[:, :k], indices.gather(1, places[:, :k])
    values = (values - statistics.top[:, None]) - statistics.log_sum[:, None]
    ignored = (labels == softmax.ignore_index)[:, None]
    return values.masked_fill(ignored, 0.0), indices.masked_fill(ignored, -1)
