"""Forward and backward pass of the log-probs on plain tensors, for autograd and for the custom operator."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs import workspace
from megatron_fp32.ops.logprobs.accumulate import LogitsGradient, OperatorGradients, operator_gradients
from megatron_fp32.ops.logprobs.gradient import gradient_vectors, live_tokens
from megatron_fp32.ops.logprobs.options import OperatorOptions, whole_hidden
from megatron_fp32.ops.logprobs.statistics import KeptLogits, TokenStatistics
from megatron_fp32.ops.logprobs.tokens import join, token_statistics
from megatron_fp32.ops.logprobs.topk import bytes_of_a_token, top_k_of
from megatron_fp32.ops.products.chunks import even_chunks
from megatron_fp32.ops.products.operands import check_operands


class Results(NamedTuple):
    """Fields of `Logprobs`, the mean being what the options ask for, and whether the label is the most probable token.

    None for what is not asked for.
    """

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor
    mean: Tensor | None
    top_logprobs: Tensor | None
    top_tokens: Tensor | None
    correct: Tensor | None


class Saved(NamedTuple):
    """What the backward pass needs besides the operands."""

    statistics: TokenStatistics
    """Without `correct`."""
    logits: Tensor | None
    """[tokens, columns] float32; None to multiply again."""


def forward_pass(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    options: OperatorOptions,
    *,
    keep: bool,
) -> tuple[Results, Saved]:
    """Compute the results; with `keep` also the logits, for the backward pass.

    Args:
        hidden: as for `linear_logprobs`, as are `weight`, `bias` and `labels`.
        weight: see `hidden`.
        bias: see `hidden`.
        labels: see `hidden`.
        inverse_temperature: [tokens], from `inverse_temperature_of`.
        options: from `operator_options`.
        keep: whether to keep the logits.
    """
    flat = labels.reshape(-1)
    x = whole_hidden(hidden, weight, flat, options)
    kept = KeptLogits.allocate(len(x), weight, with_tops=options.top_k > 0) if keep else None
    statistics, top = _statistics_and_top(x, weight, flat, inverse_temperature, options, kept, bias)
    fields = (statistics.logprob, statistics.entropy, statistics.logsumexp, statistics.mean)
    # New tensors: an output must not be what the backward pass reads, nor a view that cannot be changed in place.
    shaped = [None if field is None else _copy(field, labels.shape) for field in fields]
    tops: list[Tensor | None] = [_copy(field, (*labels.shape, options.top_k)) for field in top]
    correct = None if statistics.correct is None else _copy(statistics.correct, labels.shape)
    results = Results(*shaped, *(tops or (None, None)), correct)  # type: ignore[arg-type, call-arg]
    return results, Saved(statistics._replace(correct=None), None if kept is None else kept.values)


def backward_pass(
    upstream: Sequence[Tensor | None],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    saved: Saved,
    options: OperatorOptions,
    *,
    owner: Tensor,
    needs: tuple[bool, bool, bool],
) -> OperatorGradients:
    """dX, dW and dbias.

    Args:
        upstream: gradients of the log-probs, the entropy, the logsumexp and the mean, in any shape; None for 0.
        hidden: as for `forward_pass`, as are the following.
        weight: see `hidden`.
        bias: see `hidden`.
        labels: see `hidden`.
        inverse_temperature: see `hidden`.
        saved: from `forward_pass`.
        options: see `hidden`.
        owner: the Parameter that may have a `main_grad`.
        needs: which of the three gradients are asked for.
    """
    # TF32 may have been switched on since the forward pass.
    check_operands(hidden, weight, names=("hidden", "weight"))
    labels = labels.reshape(-1)
    logprob, entropy, logsumexp, mean = (None if g is None else g.reshape(-1).float() for g in upstream)
    vectors = gradient_vectors(
        saved.statistics,
        inverse_temperature,
        options.softmax,
        labels,
        logprob=logprob,
        entropy=entropy,
        logsumexp=logsumexp,
        mean=mean,
        mean_of=options.mean,
    )
    x, logits = whole_hidden(hidden, weight, labels, options), saved.logits

    def gradient_of(tokens: slice) -> LogitsGradient:
        return LogitsGradient(
            x[tokens],
            weight,
            labels=options.softmax.shard.local_labels(labels[tokens]),
            vectors=vectors[:, tokens],
            kept=None if logits is None else KeptLogits(values=logits[tokens], tops=None),
            softmax=options.softmax,
            pieces=options.pieces_of(x, weight),
            bias=bias,
        )

    return operator_gradients(
        gradient_of,
        x,
        hidden,
        weight,
        bias,
        live_tokens(vectors),
        options,
        owner=owner,
        needs=needs,
        products=1 if logits is None else 0,
    )


def _copy(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device).copy_(x.view(tuple(shape)))


def _statistics_and_top(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    options: OperatorOptions,
    keep: KeptLogits | None,
    bias: Tensor | None,
) -> tuple[TokenStatistics, tuple[Tensor, ...]]:
    """Statistics of all tokens; with `top_k` also log-probs and tokens, from a chunk of logits at a time."""
    take = functools.partial(
        token_statistics,
        weight=weight,
        softmax=options.softmax,
        mean=options.mean,
        chunk_size=options.chunk_size,
        correct=options.correct,
        bias=bias,
    )
    if options.top_k == 0:
        return take(x, labels=labels, inverse_temperature=inverse_temperature, keep=keep), ()
    room = workspace.workspace_bytes(x.device, parallel=options.softmax.shard.group is not None)
    largest = options.chunk_size or max(1, room // bytes_of_a_token(weight.shape[0], options.top_k))
    parts, tops = [], []
    for rows in even_chunks(len(x), largest) or [slice(0, 0)]:
        kept = (
            keep.rows(rows) if keep is not None else KeptLogits.allocate(rows.stop - rows.start, weight, with_tops=True)
        )
        y, inverse = labels[rows], inverse_temperature[rows]
        part = take(x[rows], labels=y, inverse_temperature=inverse, keep=kept)
        parts.append(part)
        tops.append(top_k_of(kept, y, inverse, part, options.softmax, options.top_k))
    return join(parts), tuple(torch.cat(column) for column in zip(*tops, strict=True))
