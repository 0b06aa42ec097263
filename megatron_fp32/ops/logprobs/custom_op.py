"""`megatron_fp32::logprobs` and `megatron_fp32::token_losses`: the head without logits for FakeTensor and compilers.

A compiler should not look into loops over chunks, kernels and collectives: the operators are opaque, and their shapes
and dtypes are declared. An operator's arguments are tensors, numbers and names, so the options travel as those. A
gradient that goes into `main_grad` cannot be declared: such a weight breaks the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from megatron_fp32.ops.logprobs.options import OperatorOptions
from megatron_fp32.ops.logprobs.passes import Results, Saved, backward_pass, forward_pass
from megatron_fp32.ops.logprobs.softmax import LogitsTransform, Mean, Softmax
from megatron_fp32.ops.logprobs.statistics import TokenStatistics
from megatron_fp32.ops.products.shard import Shard

_MEANS: tuple[Mean, ...] = get_args(Mean)


class _Plain(NamedTuple):
    """`OperatorOptions` as an operator's arguments."""

    group: str
    """Name of the process group, or "" for none."""
    sizes: list[int]
    """First, valid and all columns; `ignore_index`; pieces; `chunk_size` or 0; `top_k`; place in `_MEANS`."""
    numbers: list[float]
    """Scale; and soft cap, or 0 for none."""
    flags: list[bool]
    """Invariant, sequence parallel, reduce dX, keep logits, correct."""


def _plain(options: OperatorOptions) -> _Plain:
    softmax, shard = options.softmax, options.softmax.shard
    return _Plain(
        group="" if shard.group is None else shard.group.group_name,
        sizes=[
            shard.first_column, shard.valid_columns, shard.vocab_size, softmax.ignore_index, options.pieces,
            options.chunk_size or 0, options.top_k, _MEANS.index(options.mean),
        ],
        numbers=[softmax.transform.scale, softmax.transform.softcap or 0.0],
        flags=[
            softmax.invariant, options.sequence_parallel, options.reduce_hidden_grad, options.keep_logits,
            options.correct,
        ],
    )  # fmt: skip


def _options(group: str, sizes: list[int], numbers: list[float], flags: list[bool]) -> OperatorOptions:
    first_column, valid_columns, vocab_size, ignore_index, pieces, chunk_size, top_k, mean = sizes
    invariant, sequence_parallel, reduce_hidden_grad, keep_logits, correct = flags
    shard = Shard(
        group=_resolve_process_group(group) if group else None,  # type: ignore[arg-type]
        first_column=first_column,
        valid_columns=valid_columns,
        vocab_size=vocab_size,
    )
    transform = LogitsTransform(scale=numbers[0], softcap=numbers[1] or None)
    return OperatorOptions(
        softmax=Softmax(shard=shard, transform=transform, ignore_index=ignore_index, invariant=invariant),
        sequence_parallel=sequence_parallel,
        reduce_hidden_grad=reduce_hidden_grad,
        pieces=pieces,
        keep_logits=keep_logits,
        chunk_size=chunk_size or None,
        mean=_MEANS[mean],
        top_k=top_k,
        correct=correct,
    )


def apply(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    options: OperatorOptions,
) -> Results:
    """As `forward_pass`, with gradients for `hidden`, `weight` and `bias`."""
    plain = _plain(options)
    outputs = list(logprobs(hidden, weight, bias, labels, inverse_temperature, *plain))
    found: list[Tensor | None] = outputs[:3]
    rest = outputs[3:]
    found.append(rest.pop(0) if options.mean != "none" else None)
    # What has no gradient must not seem to have one.
    found += [rest.pop(0).detach() if options.top_k > 0 else None for _ in range(2)]
    found.append(rest.pop(0).detach() if options.correct else None)
    return Results(*found)  # type: ignore[arg-type]


@torch.library.custom_op("megatron_fp32::logprobs", mutates_args=())
def logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    group: str,
    sizes: list[int],
    numbers: list[float],
    flags: list[bool],
) -> list[Tensor]:
    """The fields of `Results` that there are, the statistics [5 or 6, tokens], and the logits that are kept."""
    options = _options(group, sizes, numbers, flags)
    results, saved = forward_pass(hidden, weight, bias, labels, inverse_temperature, options, keep=options.keep_logits)
    statistics = torch.stack([field for field in saved.statistics if field is not None])
    kept = [] if saved.logits is None else [saved.logits]
    return [field for field in results if field is not None] + [statistics] + kept


@logprobs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    group: str,
    sizes: list[int],
    numbers: list[float],
    flags: list[bool],
) -> list[Tensor]:
    shape, top_k, with_mean = tuple(labels.shape), sizes[-2], sizes[-1] > 0
    tokens = labels.numel()
    one = [hidden.new_empty(shape, dtype=torch.float32) for _ in range(4 if with_mean else 3)]
    if top_k > 0:
        one += [hidden.new_empty((*shape, top_k), dtype=dtype) for dtype in (torch.float32, torch.int64)]
    if flags[4]:
        one.append(hidden.new_empty(shape, dtype=torch.bool))
    one.append(hidden.new_empty((6 if with_mean else 5, tokens), dtype=torch.float32))
    if flags[3]:
        width = -(-weight.shape[0] // 8) * 8
        one.append(hidden.new_empty((tokens, width), dtype=torch.float32)[:, : weight.shape[0]])
    return one


@torch.library.custom_op("megatron_fp32::logprobs_backward", mutates_args=())
def _logprobs_backward(
    upstream: list[Tensor],
    given: list[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    statistics: Tensor,
    logits: Tensor | None,
    group: str,
    sizes: list[int],
    numbers: list[float],
    flags: list[bool],
    needs: list[bool],
) -> list[Tensor]:
    each = iter(upstream)
    fields = list(statistics.unbind(0))
    grads = backward_pass(
        [next(each) if there else None for there in given],
        hidden,
        weight,
        bias,
        labels,
        inverse_temperature,
        Saved(TokenStatistics(*fields, *([] if len(fields) == 6 else [None])), logits),
        _options(group, sizes, numbers, flags),
        owner=weight,
        needs=(needs[0], needs[1], needs[2]),
    )
    return [grad for grad in grads if grad is not None]


@_logprobs_backward.register_fake
def _(
    upstream: list[Tensor],
    given: list[bool],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    inverse_temperature: Tensor,
    statistics: Tensor,
    logits: Tensor | None,
    group: str,
    sizes: list[int],
    numbers: list[float],
    flags: list[bool],
    needs: list[bool],
) -> list[Tensor]:
    like = (hidden, weight, bias)
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x, needed in zip(like, needs, strict=True)
        if needed and x is not None
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
    hidden, weight, bias, labels, inverse_temperature, *ctx.plain = inputs
    kept = ctx.plain[3][3]
    statistics, logits = (output[-2], output[-1]) if kept else (output[-1], None)
    ctx.with_mean = ctx.plain[1][-1] > 0
    ctx.save_for_backward(hidden, weight, bias, labels, inverse_temperature, statistics, logits)


def _backward(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    upstream = [*grads[:3], grads[3] if ctx.with_mean else None]
    needs = [bool(ctx.needs_input_grad[at]) for at in range(3)]
    found = iter(
        _logprobs_backward(
            [g for g in upstream if g is not None],
            [g is not None for g in upstream],
            *ctx.saved_tensors,
            *ctx.plain,
            needs,
        )
    )
    return (*(next(found) if needed else None for needed in needs), *([None] * 6))


logprobs.register_autograd(_backward, setup_context=_setup)
