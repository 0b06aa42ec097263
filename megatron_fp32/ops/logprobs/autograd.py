"""`linear_logprobs`: log-probabilities and entropy of the output layer without `[tokens, vocab]` in memory.

What is rounded, and where: nothing in the forward pass; in the backward pass what `fp32_logits` rounds: dY enters with
as many bits as `grad_precision` says, dX is summed over the ranks in fp32 and rounded once, dW stays fp32 on its way to
`main_grad`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logprobs import workspace
from megatron_fp32.ops.logprobs.accumulate import (
    FloatWeightGrad,
    LogitsGradient,
    finished_hidden_grad,
    room_for_hidden_grad,
)
from megatron_fp32.ops.logprobs.gradient import gradient_vectors, live_tokens
from megatron_fp32.ops.logprobs.options import (
    Backward,
    OperatorOptions,
    inverse_temperature_of,
    operator_options,
    rows_where,
    whole_hidden,
)
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.logprobs.statistics import KeptLogits, TokenStatistics
from megatron_fp32.ops.logprobs.tokens import join, token_statistics
from megatron_fp32.ops.logprobs.topk import bytes_of_a_token, top_k_of
from megatron_fp32.ops.products.backward import accumulate_gradients
from megatron_fp32.ops.products.bias_grad import BiasGrad
from megatron_fp32.ops.products.chunks import even_chunks
from megatron_fp32.ops.products.grad_precision import GradPrecision
from megatron_fp32.ops.products.hidden_grad import HiddenGrad
from megatron_fp32.ops.products.main_grad import weight_grad_for_autograd, weight_grad_target
from megatron_fp32.ops.products.operands import check_operands, piece_dtype
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.ops.products.weight_grad import WeightGrad
from megatron_fp32.validation import check_flag


class Logprobs(NamedTuple):
    """What `linear_logprobs` returns: float32, in the shape of the labels.

    A token whose label is ignored has 0 everywhere, and -1 in `top_tokens`.
    """

    logprobs: Tensor
    """log p of the label."""
    entropy: Tensor
    """Entropy of the distribution, in nats."""
    logsumexp: Tensor
    """log of the sum of exp(logit)."""
    mean_logit: Tensor | None
    """Mean of the logits over the vocabulary, where asked for."""
    top_logprobs: Tensor | None
    """[..., top_k], largest first, where asked for; without a gradient."""
    top_tokens: Tensor | None
    """[..., top_k] int64, their tokens; of equals the smaller one first."""


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_parallel: VocabParallel | None = None,
    logits_transform: LogitsTransform | None = None,
    ignore_index: int = -100,
    grad_precision: GradPrecision = "bf16",
    backward: Backward = "recompute",
    invariant: bool = False,
    mean_logit: bool = False,
    top_k: int = 0,
    chunk_size: int | None = None,
) -> Logprobs:
    """Log-probabilities of the labels, and the entropy, of logits that are never stored.

    The logits are `softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) / temperature` in fp32. All results are
    differentiable with respect to `hidden`, `weight` and `bias`, in any combination; nothing is with respect to the
    temperature.

    What is wrong with one token stays with it, because looking for it first would make the host wait for the device. A
    NaN among a token's logits makes all of its results NaN. A label that is neither in the vocabulary nor
    `ignore_index` makes the log-prob NaN, and the gradients that come from it. A temperature that is not positive, in a
    tensor of them, is NaN. A token whose label is ignored, or whose upstream gradients are all 0, adds exactly 0 to
    every gradient, whatever its hidden states, label and temperature are.

    Args:
        hidden: [..., hidden], as for `fp32_logits`.
        weight: [vocab / tp, hidden], as for `fp32_logits`, `main_grad` included.
        labels: [...], integer: the leading shape of (all ranks') `hidden`. Every rank passes equal labels.
        bias: [vocab / tp], bfloat16, float16 or float32, or None; added in fp32. Its gradient is the sum of the dY that
            dW is made of, in fp32, rounded once, and is returned to autograd.
        temperature: divides the logits: a positive number, or a tensor that broadcasts to the shape of the labels. For
            labels [s, b], a tensor [b] has one number for every sequence, and [s, b] one for every token. Where the
            labels are on a GPU, a tensor of several numbers on the CPU makes the host wait.
        vocab_parallel: the tensor-parallel ranks, and how much of the vocabulary is padding; None for one process
            without padding. With its `sequence_parallel`, `hidden` is this rank's slice of dimension 0.
        logits_transform: the model's scale and soft cap; None for neither.
        ignore_index: label of tokens without one; all of their results are 0 and give no gradient. It may be a token of
            the vocabulary, which then is no label, but a column of the logits like the others.
        grad_precision: see `Fp32Config.grad_precision`.
        backward: `"recompute"` the logits in chunks, which costs a fourth product and a chunk of memory, or keep the
            `"saved"` ones, [tokens, vocab / tp] float32.
        invariant: the results, and the gradient with respect to `hidden`, do not change by a bit with the batch, the
            padding or the number of ranks, given hidden states and upstream gradients that do not. The gradient is what
            it is on one rank only where this function sums it over the ranks.
        mean_logit: also return the mean of the logits over the vocabulary.
        top_k: also return the log-probs of the `top_k` most probable tokens.
        chunk_size: tokens at a time; None chooses by the free memory.

    Returns:
        See `Logprobs`.

    Raises:
        TypeError: for operand dtypes that `fp32_logits` refuses, labels that are not integers, and arguments of another
            type.
        ValueError: for shapes that do not match, values outside of what an argument allows, `invariant` where it
            cannot be kept, or ranks with different numbers of rows of the weight.
    """
    check_flag("mean_logit", mean_logit)
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
        mean="logit" if mean_logit else "none",
        top_k=top_k,
        bias=bias,
    )
    inverse_temperature = inverse_temperature_of(temperature, labels, ignore_index)
    results = apply_logprobs(hidden, weight, labels, inverse_temperature, options, bias)
    return Logprobs(*results[:6])  # type: ignore[arg-type]


@torch.compiler.disable
def apply_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    options: OperatorOptions,
    bias: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Fields of `Logprobs`, the fourth of them the mean that the options ask for, and `TokenStatistics.correct`.

    Args:
        hidden: as for `linear_logprobs`.
        weight: as for `linear_logprobs`.
        labels: as for `linear_logprobs`.
        inverse_temperature: [tokens], from `inverse_temperature_of`.
        options: from `operator_options`.
        bias: as for `linear_logprobs`.
    """
    # Inside of forward, gradients are off in any case.
    keep = options.keep_logits and torch.is_grad_enabled()
    return _LinearLogprobs.apply(
        hidden, weight, labels, inverse_temperature, dataclasses.replace(options, keep_logits=keep), bias
    )


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        inverse_temperature: Tensor,
        options: OperatorOptions,
        bias: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.weight_owner = options, weight
        flat = labels.reshape(-1)
        x = whole_hidden(hidden, weight, flat, options)
        keep = None
        if options.keep_logits and any(ctx.needs_input_grad):
            keep = KeptLogits.allocate(len(x), weight, with_tops=options.top_k > 0)
        statistics, top = _statistics_and_top(x, weight, flat, inverse_temperature, options, keep, bias)
        ctx.save_for_backward(
            hidden, weight, bias, flat, inverse_temperature, None if keep is None else keep.values, *statistics[:6]
        )
        outputs = (statistics.logprob, statistics.entropy, statistics.logsumexp, statistics.mean)
        # New tensors: an output must not be what the backward pass reads, nor a view that cannot be changed in place.
        shaped = [None if x is None else _copy(x, labels.shape) for x in outputs]
        tops = [_copy(x, (*labels.shape, options.top_k)) for x in top]
        correct = None if statistics.correct is None else _copy(statistics.correct, labels.shape)
        ctx.mark_non_differentiable(*tops, *([] if correct is None else [correct]))
        return *shaped, *(tops or (None, None)), correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, inverse_temperature, logits, *saved = ctx.saved_tensors
        options: OperatorOptions = ctx.options
        # TF32 may have been switched on since the forward pass.
        check_operands(hidden, weight, names=("hidden", "weight"))
        flat = [None if g is None else g.reshape(-1).float() for g in upstream[:4]]
        vectors = gradient_vectors(
            TokenStatistics(*saved),
            inverse_temperature,
            options.softmax,
            labels,
            logprob=flat[0],
            entropy=flat[1],
            logsumexp=flat[2],
            mean=flat[3],
            mean_of=options.mean,
        )
        needs_hidden, needs_weight, *_, needs_bias = ctx.needs_input_grad
        x = whole_hidden(hidden, weight, labels, options)
        target = weight_grad_target(ctx.weight_owner) if needs_weight else None
        reduction = room_for_hidden_grad(len(x), weight, options) if needs_hidden else None
        bias_grad = BiasGrad(bias) if needs_bias else None
        _accumulate(x, weight, labels, vectors, logits, options, reduction, target, bias, bias_grad)
        grad_hidden = None
        if reduction is not None:
            grad_hidden = finished_hidden_grad(reduction, live_tokens(vectors), hidden, options)
        # Before the dummy gradient of a weight with main_grad, which is as large as the weight.
        del reduction
        grad_weight = weight_grad_for_autograd(ctx.weight_owner, target) if needs_weight else None
        grad_bias = None if bias_grad is None else bias_grad.finish()
        return grad_hidden, grad_weight, None, None, None, grad_bias


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


def _accumulate(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vectors: Tensor,
    logits: Tensor | None,
    options: OperatorOptions,
    reduction: HiddenGrad | None,
    target: WeightGrad | None,
    bias: Tensor | None,
    bias_grad: BiasGrad | None,
) -> None:
    """dX, dW and dbias, one block of tokens and of columns at a time."""
    dtype = piece_dtype(x.dtype, weight.dtype)
    pieces = options.pieces if dtype != torch.float32 else 1
    blocks = even_chunks(len(x), options.chunk_size or workspace.GRADIENT_TOKENS)
    per_element = (4 if logits is None else 0) + pieces * dtype.itemsize
    room = workspace.workspace_bytes(weight.device, parallel=options.softmax.shard.group is not None)
    sums = FloatWeightGrad(target, blocks=len(blocks))
    if not blocks:
        # Nothing to add, but other ranks and autograd expect their answers.
        blocks = [slice(0, 0)]
    for tokens in blocks:
        count = max(1, tokens.stop - tokens.start)
        live = live_tokens(vectors[:, tokens])
        # dW takes a copy of the hidden states.
        copied = 0 if target is None else count * x.shape[1] * x.element_size()
        columns = max(128, (room - copied) // (per_element * count) // 128 * 128)
        grad = LogitsGradient(
            x[tokens],
            weight,
            labels=options.softmax.shard.local_labels(labels[tokens]),
            vectors=vectors[:, tokens],
            kept=None if logits is None else KeptLogits(values=logits[tokens], tops=None),
            softmax=options.softmax,
            pieces=pieces,
            bias=bias,
        )
        last = tokens is blocks[-1]
        accumulate_gradients(
            grad,
            weight=weight,
            pieces=options.pieces,
            chunk=columns,
            hidden_sum=None if reduction is None else reduction.of(tokens, grad.bounds),
            hidden=lambda tokens=tokens, live=live: rows_where(live, x[tokens]),  # type: ignore[misc]
            weight_grad=sums.part(first=tokens is blocks[0]),
            hidden_grad_done=reduction.start if last and reduction is not None else lambda: None,
            bias_grad=bias_grad,
        )
    sums.finish()
