"""`logprobs_from_logits`: log-probabilities and entropy of logits that are stored.

The statistics are those of `linear_logprobs`, so the label is left out of every sum. They are computed in fp32 from
logits of any dtype, a chunk of tokens at a time. The gradient is computed in fp32, and rounded once, to the logits'
dtype.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logprobs import workspace
from megatron_fp32.ops.logprobs.autograd import Logprobs
from megatron_fp32.ops.logprobs.gradient import gradient_vectors, softmax_gradient
from megatron_fp32.ops.logprobs.options import inverse_temperature_of
from megatron_fp32.ops.logprobs.softmax import FIELDS, LogitsTransform, Softmax
from megatron_fp32.ops.logprobs.statistics import TokenStatistics, combine, finish, over_ranks, statistics_torch
from megatron_fp32.ops.logprobs.stored_rows import StoredRows
from megatron_fp32.ops.products.chunks import even_chunks
from megatron_fp32.ops.products.operands import SIXTEEN_BIT, check_plain
from megatron_fp32.ops.products.shard import BLOCK, VocabParallel, columns_are_even, shard_of_columns
from megatron_fp32.validation import check_count, check_flag


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    softmax: Softmax
    chunk_size: int | None
    inplace_backward: bool


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_parallel: VocabParallel | None = None,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    inplace_backward: bool = False,
) -> Logprobs:
    """Log-probabilities of the labels, and the entropy, of logits that are stored.

    Everything is of `logits / temperature`. All results are differentiable with respect to the logits, and nothing is
    with respect to the temperature. No fp32 copy of more than a chunk of the logits is made; on CUDA there is none at
    all where the logits' rows are dense in memory.

    What is wrong with one token stays with it, as in `linear_logprobs`: NaN logits, impossible labels and temperatures,
    ignored labels, and upstream gradients of 0.

    Args:
        logits: [..., vocab / tp], this rank's columns, in bfloat16, float16 or float32. They are not changed, unless
            `inplace_backward` asks for it.
        labels: [...], integer. Every rank passes equal labels.
        temperature: divides the logits: a positive number, or one for every token, in the shape of the labels.
        vocab_parallel: the tensor-parallel ranks, and how much of the vocabulary is padding; None for one process
            without padding. `reduce_hidden_grad` does not apply.
        ignore_index: label of tokens without one; all of their results are 0 and give no gradient.
        chunk_size: tokens at a time; None for `workspace.STATISTICS_TOKENS` on CUDA, and for `workspace.BYTES` of fp32
            logits where they must be copied.
        inplace_backward: write the gradient over the logits in the backward pass, which saves memory of their size.
            Another operator that has saved the logits raises RuntimeError if its backward pass comes later.

    Returns:
        See `Logprobs`. `mean_logit`, `top_logprobs` and `top_tokens` are None. Where ranks have different numbers of
        columns, all results are NaN on CUDA, where the host does not wait for the device to find out.

    Raises:
        TypeError: for logits of another dtype, labels that are not integers, DTensors, and arguments of another type.
        ValueError: for shapes that do not match, values outside of what an argument allows, a `vocab_parallel` with
            `sequence_parallel`, `inplace_backward` where the gradient cannot take the logits' place, or, on the CPU,
            ranks with different numbers of columns.
    """
    parallel = VocabParallel() if vocab_parallel is None else vocab_parallel
    _check_arguments(logits, labels, parallel)
    check_count("ignore_index", ignore_index, least=-(2**63))
    check_flag("inplace_backward", inplace_backward)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    shard = shard_of_columns(logits.shape[-1], parallel)
    if 0 <= ignore_index < shard.vocab_size:
        raise ValueError(f"ignore_index must not be a token of the vocabulary, got {ignore_index}")
    if inplace_backward:
        _check_in_place(logits)
    inverse_temperature = inverse_temperature_of(temperature, labels, ignore_index).view(labels.shape)
    if shard.group is not None:
        even = columns_are_even(logits, shard.group)
        inverse_temperature = torch.where(even, inverse_temperature, torch.nan)
    softmax = Softmax(shard=shard, transform=LogitsTransform(), ignore_index=ignore_index, invariant=False)
    options = _Options(softmax=softmax, chunk_size=chunk_size, inplace_backward=inplace_backward)
    logprobs, entropy, logsumexp = _apply(logits, labels, inverse_temperature, options)
    return Logprobs(logprobs, entropy, logsumexp, None, None, None)


def _check_arguments(logits: Tensor, labels: Tensor, parallel: VocabParallel) -> None:
    if not isinstance(parallel, VocabParallel):
        raise TypeError(f"vocab_parallel must be a VocabParallel or None, got {parallel!r}")
    if parallel.sequence_parallel:
        raise ValueError("vocab_parallel.sequence_parallel must be False: logits are of all ranks' tokens already")
    check_plain(logits=logits, labels=labels)
    if logits.dtype not in (*SIXTEEN_BIT, torch.float32):
        raise TypeError(f"logits must be bfloat16, float16 or float32, got {logits.dtype}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if logits.dim() < 1 or logits.shape[-1] < 1 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            "expected logits [..., columns] and labels of their leading shape, "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )


def _check_in_place(logits: Tensor) -> None:
    if logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace_backward must be False for logits that are a leaf: it would destroy a parameter")
    if not StoredRows(logits).writable:
        raise ValueError(
            "inplace_backward must be False for logits whose rows overlap or are not dense in memory, got the shape "
            f"{tuple(logits.shape)} with strides {logits.stride()}"
        )


@torch.compiler.disable
def _apply(
    logits: Tensor, labels: Tensor, inverse_temperature: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    return _LogprobsFromLogits.apply(logits, labels, inverse_temperature, options)


class _LogprobsFromLogits(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, inverse_temperature: Tensor, options: _Options
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.options = options
        rows = StoredRows(logits)
        flat, inverse = rows.flatten(labels), rows.flatten(inverse_temperature)
        statistics = _statistics(rows, flat, inverse, options)
        ctx.save_for_backward(logits, flat, inverse, *statistics[:5])
        return tuple(rows.unflatten(x) for x in (statistics.logprob, statistics.entropy, statistics.logsumexp))

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, labels, inverse_temperature, *saved = ctx.saved_tensors
        options: _Options = ctx.options
        rows = StoredRows(logits)
        logprob, entropy, logsumexp = [None if g is None else rows.flatten(g).float() for g in upstream]
        vectors = gradient_vectors(
            TokenStatistics(*saved, mean=None),  # type: ignore[call-arg]
            inverse_temperature,
            options.softmax,
            labels,
            logprob=logprob,
            entropy=entropy,
            logsumexp=logsumexp,
            mean=None,
            mean_of="none",
        )
        grad, target = rows.in_place() if options.inplace_backward else rows.like()
        for chunk in _chunks(rows, options):
            softmax_gradient(
                rows[chunk],
                vectors[:, chunk].contiguous(),
                options.softmax.shard.local_labels(labels[chunk]),
                options.softmax,
                first=0,
                count=1,
                dtype=logits.dtype,
                scale=None,
                out=target[chunk],
            )
        if options.inplace_backward:
            # A kernel's writes are not counted, and an operator that has saved the logits must hear of them.
            torch.autograd.graph.increment_version(logits)
        return grad, None, None, None


def _statistics(rows: StoredRows, labels: Tensor, inverse_temperature: Tensor, options: _Options) -> TokenStatistics:
    """Of all tokens, with one exchange between the ranks: how they cut the tokens does not matter."""
    softmax = options.softmax
    local = softmax.shard.local_labels(labels)
    parts = []
    label_logits = torch.zeros(rows.tokens, dtype=torch.float32, device=labels.device)
    for chunk in _chunks(rows, options):
        raw, count = rows[chunk], chunk.stop - chunk.start
        blocks = torch.empty(-(-rows.columns // BLOCK), FIELDS["none"], count, device=raw.device)
        arguments = (local[chunk], inverse_temperature[chunk], softmax, blocks, label_logits[chunk])
        if raw.is_cuda:
            from megatron_fp32.ops.logprobs.kernels import statistics_triton

            with torch.cuda.device(raw.device):
                statistics_triton(raw, *arguments)
        else:
            statistics_torch(raw.float(), *arguments)
        parts.append(combine(blocks))
    if not parts:
        empty = inverse_temperature.new_empty(0)
        return TokenStatistics(empty, empty, empty, empty, empty, None)
    return finish(*over_ranks(torch.cat(parts, 2), label_logits, softmax), labels, softmax)


def _chunks(rows: StoredRows, options: _Options) -> list[slice]:
    if options.chunk_size is not None:
        return even_chunks(rows.tokens, options.chunk_size)
    largest = workspace.STATISTICS_TOKENS
    if rows.copied or not rows.is_cuda:
        largest = min(largest, max(1, workspace.BYTES // (4 * rows.columns)))
    return even_chunks(rows.tokens, largest)
