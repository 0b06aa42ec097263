"""`linear_logprobs`: log-probabilities and entropy of the output layer without `[tokens, vocab]` in memory.

What is rounded, and where: nothing in the forward pass; in the backward pass what `fp32_logits` rounds: dY enters with
as many bits as `grad_precision` says, dX is summed over the ranks in fp32 and rounded once, dW stays fp32 on its way to
`main_grad`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_fp32.config import GradPrecision, check_grad_precision
from megatron_fp32.ops.logits.autograd import PIECES
from megatron_fp32.ops.logits.fixed_order import check_fixed_order, why_not_fixed_order
from megatron_fp32.ops.logits.gemm import check_operands
from megatron_fp32.ops.logits.main_grad import weight_grad_for_autograd, weight_grad_target
from megatron_fp32.ops.logits.products import WeightGrad, accumulate_gradients
from megatron_fp32.ops.logits.ranks import HiddenGrad, gather_first_dim
from megatron_fp32.ops.logits.split import Pieces
from megatron_fp32.ops.logprobs import workspace
from megatron_fp32.ops.logprobs.gradient import gradient_scale, gradient_vectors, softmax_gradient
from megatron_fp32.ops.logprobs.statistics import KeptLogits, Shard, TokenStatistics, product
from megatron_fp32.ops.logprobs.tokens import token_statistics

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Arguments of the operators of this folder, checked and put in order by `head_options`."""

    shard: Shard
    sequence_parallel: bool
    reduce_hidden_grad: bool
    pieces: int
    keep_logits: bool
    chunk_size: int | None
    with_total: bool


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
        invariant: the results do not change by a bit with the batch, the padding or the number of ranks, given hidden
            states that do not. Does not include gradients.
        mean_logit: return the mean of the logits, too.
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
    if backward not in get_args(Backward):
        raise ValueError(f"backward must be one of {get_args(Backward)}, got {backward!r}")
    heat = inverse_temperature(temperature, labels)
    options = dataclasses.replace(options, keep_logits=backward == "saved", with_total=mean_logit)
    return Logprobs(*_eager(hidden, weight, labels, heat, options))


@torch.compiler.disable
def _eager(
    hidden: Tensor, weight: Tensor, labels: Tensor, heat: Tensor, options: HeadOptions
) -> tuple[Tensor | None, ...]:
    return _LinearLogprobs.apply(hidden, weight, labels, heat, options)


def head_options(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    vocab_size: int | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    grad_precision: GradPrecision,
    invariant: bool,
    chunk_size: int | None,
) -> HeadOptions:
    """Check the arguments that the operators of this folder share. Raises what they say."""
    check_grad_precision(grad_precision)
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "expected hidden [..., hidden] of 2 or more dimensions and weight [vocab, hidden], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    check_operands(hidden, weight, names=("hidden", "weight"))
    group = tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    first = hidden.shape[0] * (ranks if sequence_parallel else 1)
    if tuple(labels.shape) != (first, *hidden.shape[1:-1]):
        raise ValueError(f"expected labels {(first, *hidden.shape[1:-1])}, got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    columns = weight.shape[0]
    if vocab_size is not None and not 0 < vocab_size <= columns * ranks:
        raise ValueError(f"vocab_size must be 1 to {columns * ranks}, the rows of the weight, got {vocab_size}")
    if 0 <= ignore_index < (vocab_size or columns * ranks):
        raise ValueError(f"ignore_index must not be a token of the vocabulary, got {ignore_index}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be positive or None, got {chunk_size}")
    if invariant:
        _check_invariant(hidden, weight, ranks)
    first_column = rank * columns
    total = columns * ranks if vocab_size is None else vocab_size
    shard = Shard(
        group=group,
        first_column=first_column,
        valid_columns=min(max(total - first_column, 0), columns),
        vocab_size=total,
        scale=scale,
        softcap=softcap,
        ignore_index=ignore_index,
        invariant=invariant,
    )
    return HeadOptions(
        shard=shard,
        sequence_parallel=sequence_parallel and group is not None,
        reduce_hidden_grad=reduce_hidden_grad and group is not None and not sequence_parallel,
        pieces=PIECES[grad_precision],
        keep_logits=False,
        chunk_size=chunk_size,
        with_total=False,
    )


def _check_invariant(hidden: Tensor, weight: Tensor, ranks: int) -> None:
    check_fixed_order(hidden, weight)
    if ranks > 1 and weight.shape[0] % 128 != 0:
        raise ValueError(
            "invariant=True sums over blocks of 128 tokens of the vocabulary, which must not cross ranks: expected a "
            f"multiple of 128 rows of the weight on every rank, got {weight.shape[0]}"
        )


def inverse_temperature(temperature: float | Tensor, labels: Tensor) -> Tensor:
    """[tokens] float32, 1 / temperature.

    Raises:
        ValueError: for a number that is not positive, or a tensor in another shape than the labels' or that requires a
            gradient.
    """
    if isinstance(temperature, Tensor):
        if temperature.shape != labels.shape or temperature.requires_grad:
            raise ValueError(
                f"expected a temperature without gradient and of the labels' shape {tuple(labels.shape)}, got "
                f"{tuple(temperature.shape)}, requires_grad={temperature.requires_grad}"
            )
        return temperature.to(labels.device, torch.float32).reciprocal().reshape(-1).contiguous()
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return torch.full((labels.numel(),), 1 / temperature, dtype=torch.float32, device=labels.device)


def whole_hidden(hidden: Tensor, options: HeadOptions) -> Tensor:
    """[tokens, hidden] of all ranks."""
    if options.sequence_parallel:
        hidden = gather_first_dim(hidden, options.shard.group)
    return hidden.reshape(-1, hidden.shape[-1])


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, heat: Tensor, options: HeadOptions
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.weight_owner = options, weight
        x, flat = whole_hidden(hidden, options), labels.reshape(-1)
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        keep = KeptLogits.allocate(len(x), weight, exponentials=False) if options.keep_logits and needed else None
        statistics = token_statistics(
            x,
            weight,
            flat,
            heat,
            options.shard,
            with_total=options.with_total,
            keep=keep,
            chunk_size=options.chunk_size,
        )
        ctx.save_for_backward(hidden, weight, flat, heat, None if keep is None else keep.values, *statistics)
        mean = None if statistics.total is None else statistics.total / options.shard.vocab_size
        outputs = (statistics.logprob, statistics.entropy, statistics.logsumexp, mean)
        # New tensors: an output must not be what the backward pass reads, nor a view that cannot be changed in place.
        new = [None if x is None else torch.empty(labels.shape, dtype=x.dtype, device=x.device) for x in outputs]
        return tuple(
            None if a is None or x is None else a.copy_(x.view_as(a)) for a, x in zip(new, outputs, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, heat, logits, *saved = ctx.saved_tensors
        options: HeadOptions = ctx.options
        flat = [None if g is None else g.reshape(-1).float() for g in upstream]
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
        rows = len(x) if needs_hidden else 1
        reduction = HiddenGrad(
            torch.empty(rows, weight.shape[1], dtype=torch.float32, device=weight.device),
            group=options.shard.group,
            scatter=options.sequence_parallel,
            reduce=options.reduce_hidden_grad,
        )
        _accumulate(x, weight, labels, vectors, logits, options, reduction if needs_hidden else None, target)
        grad_hidden = reduction.finish().view(hidden.shape).to(hidden.dtype) if needs_hidden else None
        # Before the dummy gradient of a weight with main_grad, which is as large as the weight.
        del reduction
        grad_weight = weight_grad_for_autograd(ctx.weight_owner, target) if needs_weight else None
        return grad_hidden, grad_weight, None, None, None


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
    room = workspace.workspace_bytes(weight.device) // per_element
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
            hidden_grad=None if reduction is None else reduction.partial[tokens],
            hidden=lambda tokens=tokens: x[tokens],  # type: ignore[misc]
            weight_grad=sums.part(first=tokens is blocks[0]),
            hidden_grad_done=reduction.start if last and reduction is not None else lambda: None,
        )
    sums.finish()


class LogitsGradient:
    """dY of a block of tokens, columns at a time, as `accumulate_gradients` asks for it."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        labels: Tensor,
        vectors: Tensor,
        kept: KeptLogits | None,
        shard: Shard,
        pieces: int,
    ) -> None:
        self._hidden, self._weight, self._labels = hidden, weight, labels
        self._vectors, self._kept = vectors.contiguous(), kept
        self._shard, self._pieces = shard, pieces
        self._scale = gradient_scale(self._vectors, shard, count=pieces, dtype=weight.dtype)
        self._fixed = shard.invariant and why_not_fixed_order(hidden, weight) is None

    def __call__(self, rows: slice) -> Pieces:
        """[tokens, columns] in pieces."""
        if self._kept is None:
            raw = product(self._hidden, self._weight[rows], fixed_order=self._fixed)
        else:
            assert self._kept.tops is None
            raw = self._kept.values[:, rows]
        return softmax_gradient(
            raw,
            self._vectors,
            self._labels,
            self._shard,
            first=rows.start,
            count=self._pieces,
            dtype=self._weight.dtype,
            scale=self._scale,
        )


class FloatWeightGrad:
    """dW over several blocks of tokens: in fp32 until the last one, whatever dtype its target has."""

    def __init__(self, target: WeightGrad | None, *, blocks: int) -> None:
        self._target, self._sum = target, target
        if target is not None and blocks > 1 and target.target.dtype != torch.float32:
            self._sum = WeightGrad(target=torch.empty_like(target.target, dtype=torch.float32), accumulate=False)

    def part(self, *, first: bool) -> WeightGrad | None:
        """Where the next block's dW goes."""
        if self._sum is None or first:
            return self._sum
        return dataclasses.replace(self._sum, accumulate=True)

    def finish(self) -> None:
        """Round once, where the target wants it."""
        if self._sum is self._target:
            return
        assert self._sum is not None
        assert self._target is not None
        if self._target.accumulate:
            self._target.target.add_(self._sum.target)
        else:
            self._target.target.copy_(self._sum.target)
