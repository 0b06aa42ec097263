"""`linear_logprobs`: log-probabilities and entropy of the output layer without `[tokens, vocab]` in memory.

What is rounded, and where: nothing in the forward pass; in the backward pass what `fp32_logits` rounds: dY enters with
as many bits as `grad_precision` says, dX is summed over the ranks in fp32 and rounded once, dW stays fp32 on its way to
`main_grad`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fp32.config import GradPrecision
from megatron_fp32.ops.logits.gemm import check_operands
from megatron_fp32.ops.logits.main_grad import weight_grad_for_autograd, weight_grad_target
from megatron_fp32.ops.logits.products import WeightGrad, accumulate_gradients
from megatron_fp32.ops.logits.ranks import HiddenGrad
from megatron_fp32.ops.logprobs import workspace
from megatron_fp32.ops.logprobs.accumulate import FloatWeightGrad, LogitsGradient, room_for_hidden_grad
from megatron_fp32.ops.logprobs.gradient import gradient_vectors
from megatron_fp32.ops.logprobs.options import HeadOptions, head_options, inverse_temperature, whole_hidden
from megatron_fp32.ops.logprobs.statistics import KeptLogits, TokenStatistics
from megatron_fp32.ops.logprobs.tokens import join, token_statistics
from megatron_fp32.ops.logprobs.topk import top_k_of
from megatron_fp32.validation import check_choice, check_flag

Backward = Literal["recompute", "saved"]
"""Where the backward pass finds the logits: it multiplies again, or they were kept."""


class Logprobs(NamedTuple):
    """What `linear_logprobs` returns: float32, in the shape of the labels."""

    logprobs: Tensor
    """log p of the label, 0 where it is ignored."""
    entropy: Tensor
    """Entropy of the distribution, in nats; of ignored tokens, too."""
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
    tp_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    reduce_hidden_grad: bool = True,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    grad_precision: GradPrecision = "bf16",
    backward: Backward = "recompute",
    invariant: bool = False,
    mean_logit: bool = False,
    top_k: int = 0,
    chunk_size: int | None = None,
) -> Logprobs:
    """Log-probabilities of the labels, and the entropy, of logits that are never stored.

    The logits are `softcap * tanh(scale * hidden @ weight.T / softcap) / temperature` in fp32, without a bias. All
    results are differentiable with respect to `hidden` and `weight`, in any combination; nothing is with respect to the
    temperature. A label that is neither in the vocabulary nor `ignore_index` makes its token's log-prob and gradients
    NaN: looking for it first would make the host wait for the device.

    Args:
        hidden: [..., hidden], as for `fp32_logits`; with `sequence_parallel` this rank's slice of dimension 0.
        weight: [vocab / tp, hidden], as for `fp32_logits`, `main_grad` included.
        labels: [...], integer: the leading shape of (all ranks') `hidden`; the same on every rank.
        tp_group: ranks that hold the other rows of the weight, in order; None for one process.
        sequence_parallel: gather `hidden` over `tp_group` before the product and scatter its gradient after.
        reduce_hidden_grad: sum the gradient of `hidden` over `tp_group`; does not apply with `sequence_parallel`.
        vocab_size: how many columns are no padding; None for all of them.
        temperature: divides the logits: a positive number, or one for every token, in the shape of the labels.
        scale: multiplies the product.
        softcap: Gemma's soft cap; None for none.
        ignore_index: label of tokens without one; their log-prob is 0 and gives no gradient.
        grad_precision: see `Fp32Config.grad_precision`.
        backward: `"recompute"` the logits in chunks, which costs a fourth product and a chunk of memory, or keep the
            `"saved"` ones, [tokens, vocab / tp] float32.
        invariant: the results, and the gradient with respect to `hidden`, do not change by a bit with the batch, the
            padding or the number of ranks, given hidden states and upstream gradients that do not. The gradient is what
            it is on one rank only where this function sums it over the ranks.
        mean_logit: return the mean of the logits, too.
        top_k: return so many of the most probable tokens, too.
        chunk_size: tokens at a time; None chooses by the free memory.

    Returns:
        See `Logprobs`.

    Raises:
        TypeError: for operand dtypes that `fp32_logits` refuses, or labels that are no integers.
        ValueError: for shapes that do not match, values outside of what an argument allows, or `invariant` where it
            cannot be kept.
    """
    options = head_options(
        hidden,
        weight,
        labels,
        tp_group=tp_group,
        sequence_parallel=sequence_parallel,
        reduce_hidden_grad=reduce_hidden_grad,
        vocab_size=vocab_size,
        scale=scale,
        softcap=softcap,
        ignore_index=ignore_index,
        grad_precision=grad_precision,
        invariant=invariant,
        chunk_size=chunk_size,
    )
    check_choice("backward", backward, get_args(Backward))
    check_flag("mean_logit", mean_logit)
    if not 0 <= top_k <= options.shard.vocab_size:
        raise ValueError(f"top_k must be 0 to {options.shard.vocab_size}, the size of the vocabulary, got {top_k}")
    heat = inverse_temperature(temperature, labels)
    options = dataclasses.replace(options, keep_logits=backward == "saved", with_total=mean_logit, top_k=top_k)
    return Logprobs(*_eager(hidden, weight, labels, heat, options))


@torch.compiler.disable
def _eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, heat: Tensor, options: HeadOptions
) -> tuple[Tensor | None, ...]:
    # Inside of forward, gradients are off in any case.
    keep = options.keep_logits and torch.is_grad_enabled()
    return _LinearLogprobs.apply(hidden, weight, labels, heat, dataclasses.replace(options, keep_logits=keep))


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, heat: Tensor, options: HeadOptions
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.weight_owner = options, weight
        x, flat = whole_hidden(hidden, options), labels.reshape(-1)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = None
        if options.keep_logits and needed:
            keep = KeptLogits.allocate(len(x), weight, with_tops=options.top_k > 0)
        statistics, top = _statistics_and_top(x, weight, flat, heat, options, keep)
        ctx.save_for_backward(hidden, weight, flat, heat, None if keep is None else keep.values, *statistics)
        mean = None if statistics.total is None else statistics.total / options.shard.vocab_size
        outputs = (statistics.logprob, statistics.entropy, statistics.logsumexp, mean)
        # New tensors: an output must not be what the backward pass reads, nor a view that cannot be changed in place.
        shaped = [None if x is None else _copy(x, labels.shape) for x in outputs]
        tops = [_copy(x, (*labels.shape, options.top_k)) for x in top]
        ctx.mark_non_differentiable(*tops)
        return *shaped, *(tops or (None, None))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, heat, logits, *saved = ctx.saved_tensors
        options: HeadOptions = ctx.options
        # TF32 may have been switched on since the forward pass.
        check_operands(hidden, weight, names=("hidden", "weight"))
        flat = [None if g is None else g.reshape(-1).float() for g in upstream[:4]]
        if flat[0] is not None:
            flat[0] = torch.where(labels == options.shard.ignore_index, 0.0, flat[0])
        vectors = gradient_vectors(
            TokenStatistics(*saved),
            heat,
            options.shard,
            logprob=flat[0],
            entropy=flat[1],
            logsumexp=flat[2],
            mean_logit=flat[3],
        )
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        x = whole_hidden(hidden, options)
        target = weight_grad_target(ctx.weight_owner) if needs_weight else None
        reduction = room_for_hidden_grad(len(x), weight, options) if needs_hidden else None
        _accumulate(x, weight, labels, vectors, logits, options, reduction, target)
        grad_hidden = None if reduction is None else reduction.finish().view(hidden.shape).to(hidden.dtype)
        # Before the dummy gradient of a weight with main_grad, which is as large as the weight.
        del reduction
        grad_weight = weight_grad_for_autograd(ctx.weight_owner, target) if needs_weight else None
        return grad_hidden, grad_weight, None, None, None


def _copy(x: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device).copy_(x.view(tuple(shape)))


def _statistics_and_top(
    x: Tensor, weight: Tensor, labels: Tensor, heat: Tensor, options: HeadOptions, keep: KeptLogits | None
) -> tuple[TokenStatistics, tuple[Tensor, ...]]:
    """Statistics of all tokens; with `top_k` also log-probs and tokens, from a chunk of logits at a time."""
    with_total, chunk_size = options.with_total, options.chunk_size
    if options.top_k == 0:
        statistics = token_statistics(
            x, weight, labels, heat, options.shard, with_total=with_total, keep=keep, chunk_size=chunk_size
        )
        return statistics, ()
    largest = chunk_size or max(
        1, workspace.workspace_bytes(x.device, parallel=options.shard.group is not None) // (4 * weight.shape[0])
    )
    parts, tops = [], []
    for rows in workspace.even_chunks(len(x), largest) or [slice(0, 0)]:
        kept = (
            keep.rows(rows) if keep is not None else KeptLogits.allocate(rows.stop - rows.start, weight, with_tops=True)
        )
        part = token_statistics(
            x[rows], weight, labels[rows], heat[rows], options.shard, with_total=with_total, keep=kept,
            chunk_size=chunk_size,
        )  # fmt: skip
        parts.append(part)
        tops.append(top_k_of(kept, heat[rows], part, options.shard, options.top_k))
    return join(parts), tuple(torch.cat(column) for column in zip(*tops, strict=True))


def _accumulate(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vectors: Tensor,
    logits: Tensor | None,
    options: HeadOptions,
    reduction: HiddenGrad | None,
    target: WeightGrad | None,
) -> None:
    """dX and dW, one block of tokens and of columns at a time."""
    pieces = options.pieces if weight.dtype != torch.float32 else 1
    blocks = workspace.even_chunks(len(x), options.chunk_size or workspace.GRADIENT_TOKENS)
    per_element = (4 if logits is None else 0) + pieces * weight.element_size()
    room = workspace.workspace_bytes(weight.device, parallel=options.shard.group is not None) // per_element
    sums = FloatWeightGrad(target, blocks=len(blocks))
    if not blocks:
        # Nothing to add, but other ranks and autograd expect their answers.
        blocks = [slice(0, 0)]
    for tokens in blocks:
        columns = max(128, room // max(1, tokens.stop - tokens.start) // 128 * 128)
        grad = LogitsGradient(
            x[tokens],
            weight,
            labels=options.shard.local_labels(labels[tokens]),
            vectors=vectors[:, tokens],
            kept=None if logits is None else KeptLogits(values=logits[tokens], tops=None),
            shard=options.shard,
            pieces=pieces,
        )
        last = tokens is blocks[-1]
        accumulate_gradients(
            grad,
            weight=weight,
            pieces=options.pieces,
            chunk=columns,
            hidden_sum=None if reduction is None else reduction.of(tokens, grad.bounds),
            hidden=lambda tokens=tokens: x[tokens],  # type: ignore[misc]
            weight_grad=sums.part(first=tokens is blocks[0]),
            hidden_grad_done=reduction.start if last and reduction is not None else lambda: None,
        )
    sums.finish()
