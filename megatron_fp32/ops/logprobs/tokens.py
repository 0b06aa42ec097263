"""Token statistics of any number of tokens, a chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs import workspace
from megatron_fp32.ops.logprobs.options import OperatorOptions
from megatron_fp32.ops.logprobs.softmax import Mean, Softmax
from megatron_fp32.ops.logprobs.statistics import (
    KeptLogits,
    TokenStatistics,
    block_statistics,
    finish,
    over_ranks,
)
from megatron_fp32.ops.products.chunks import even_chunks, extended
from megatron_fp32.ops.products.fixed_order import ROWS, why_not_fixed_order


def token_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    softmax: Softmax,
    *,
    mean: Mean,
    keep: KeptLogits | None = None,
    chunk_size: int | None = None,
    correct: bool = False,
    bias: Tensor | None = None,
) -> TokenStatistics:
    """Multiply, take the statistics, put them together over blocks and ranks.

    Args:
        hidden: [tokens, hidden].
        weight: [columns, hidden], this rank's rows.
        labels: [tokens], indices into the whole vocabulary.
        inverse_temperature: [tokens] float32.
        softmax: over the vocabulary, with this rank's columns.
        mean: what else to average over the vocabulary.
        keep: room for the logits of all of them.
        chunk_size: tokens at a time.
        correct: also tell whether each label is the most probable token.
        bias: [columns] or None.
    """
    tokens = hidden.shape[0]
    # On the CPU the width of a vector operation, and with it a bit, could depend on the number of tokens.
    largest = ROWS if not hidden.is_cuda else chunk_size or workspace.STATISTICS_TOKENS
    if why_not_fixed_order(hidden, weight) is not None or bias is not None:
        # The products are stored on the way to their statistics.
        largest = min(largest, max(1, workspace.BYTES // (4 * weight.shape[0])))
    parts = []
    for rows in even_chunks(tokens, largest) if hidden.is_cuda else _fixed_chunks(tokens):
        x, y, inverse = hidden[rows], labels[rows], inverse_temperature[rows]
        count = rows.stop - rows.start
        if not hidden.is_cuda and count < ROWS:
            more = ROWS - count
            x, y, inverse = extended(x, more, 0), extended(y, more, softmax.ignore_index), extended(inverse, more, 1)
        kept = None if keep is None else keep.rows(rows)
        if kept is not None and count < len(x):
            kept = KeptLogits.allocate(len(x), weight, with_tops=kept.tops is not None)
        statistics, label_logits = block_statistics(
            x, weight, softmax.shard.local_labels(y), inverse, softmax, mean=mean, keep=kept, bias=bias
        )
        if keep is not None and kept is not None and count < len(x):
            keep.values[rows] = kept.values[:count]
            if keep.tops is not None and kept.tops is not None:
                keep.tops[:, rows] = kept.tops[:, :count]
        done = finish(*over_ranks(statistics, label_logits, softmax), y, softmax, correct=correct)
        parts.append(TokenStatistics(*(None if field is None else field[:count] for field in done)))  # type: ignore[arg-type]
    if not parts:
        empty = inverse_temperature.new_empty(0)
        return TokenStatistics(
            empty, empty, empty, empty, empty, None if mean == "none" else empty, empty.bool() if correct else None
        )
    return join(parts)


def join(parts: list[TokenStatistics]) -> TokenStatistics:
    """The statistics of all tokens, from the statistics of successive chunks."""
    if len(parts) == 1:
        return parts[0]
    columns = [None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True)]
    return TokenStatistics(*columns)  # type: ignore[arg-type]


def stored_chunks(tokens: int, weight: Tensor, options: OperatorOptions, bytes_of_a_token: int) -> list[slice]:
    """Tokens whose logits, and what is made of them, fit the workspace; at least one chunk, which may be empty.

    On the CPU `ROWS` tokens at a time, for the reason that `token_statistics` has.
    """
    if not weight.is_cuda:
        return _fixed_chunks(tokens) or [slice(0, 0)]
    room = workspace.workspace_bytes(weight.device, parallel=options.softmax.shard.group is not None)
    return even_chunks(tokens, options.chunk_size or max(1, room // bytes_of_a_token)) or [slice(0, 0)]


def _fixed_chunks(tokens: int) -> list[slice]:
    return [slice(start, min(start + ROWS, tokens)) for start in range(0, tokens, ROWS)]
