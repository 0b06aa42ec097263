"""Log-probs of several tokens for every position, given or the most probable ones, without the logits.

`linear_logprobs` takes one label for each position. Distillation from a teacher's top-k, scoring of candidates and a
sampler's keep set need many. What is rounded is what `linear_logprobs` rounds. `slots.py` has the formulas.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logprobs.accumulate import (
    LogitsGradient,
    operator_gradients,
)
from megatron_fp32.ops.logprobs.gradient import live_tokens
from megatron_fp32.ops.logprobs.options import (
    OperatorOptions,
    inverse_temperature_of,
    operator_options,
    positions_of,
    whole_hidden,
)
from megatron_fp32.ops.logprobs.slots import (
    SlotGradient,
    Slots,
    SlotStatistics,
    SlotUpstream,
    slot_gradient,
    slot_softmax,
    slot_statistics,
)
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.logprobs.statistics import KeptLogits
from megatron_fp32.ops.logprobs.tokens import stored_chunks, token_statistics
from megatron_fp32.ops.logprobs.topk import bytes_of_a_token, top_k_of
from megatron_fp32.ops.products.chunks import extended
from megatron_fp32.ops.products.fixed_order import ROWS, why_not_fixed_order
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.grad_precision import GradPrecision
from megatron_fp32.ops.products.operands import check_operands, check_plain
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.ops.products.split import Pieces, split_torch
from megatron_fp32.validation import check_count


class SelectedLogprobs(NamedTuple):
    """What `linear_selected_logprobs` and `linear_top_logprobs` return, differentiable but for the tokens.

    A position whose tokens are all ignored has 0 everywhere, and so has an ignored slot of another position.
    """

    logprobs: Tensor
    """[..., K] float32: log p of each token."""
    logits: Tensor
    """[..., K] float32: its logit, after scale, soft cap and temperature. What you compute from the logits of these
    tokens alone has a gradient that is exactly 0 for all other tokens."""
    tokens: Tensor
    """[..., K]: the tokens, as they were given, or int64, the most probable one first."""
    rest: Tensor
    """[...] float32: log of the probability of all other tokens together; -inf where there is none."""
    entropy: Tensor
    """[...] float32, in nats, of the whole distribution."""
    logsumexp: Tensor
    """[...] float32, of all logits."""


def linear_selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_parallel: VocabParallel | None = None,
    logits_transform: LogitsTransform | None = None,
    ignore_index: int = -100,
    grad_precision: GradPrecision = "bf16",
    invariant: bool = False,
    chunk_size: int | None = None,
) -> SelectedLogprobs:
    """Log-probs of K given tokens for every position, and the probability of the rest.

    A token may be given twice: both slots then have its log-prob, and its gradient is the sum of theirs. A token that
    is neither in the vocabulary nor `ignore_index` has NaN as its log-prob and logit, and so have the gradients that
    come from them; the other results of its position do not change.

    Takes the arguments of `linear_logprobs` that are not listed here, and:

    Args:
        hidden: [..., hidden], as for `linear_logprobs`.
        weight: [vocab / tp, hidden], as for `linear_logprobs`.
        tokens: [..., K], integer: the leading shape of (all ranks') `hidden`, and K of at least 1. Every rank passes
            equal tokens.
        ignore_index: marks slots without a token.

    Raises:
        As `linear_logprobs`.
    """
    check_plain(tokens=tokens)
    if tokens.dim() != hidden.dim() or tokens.shape[-1] < 1:
        raise ValueError(
            f"expected tokens [..., K], K at least 1, with as many dimensions as hidden {tuple(hidden.shape)}, "
            f"got {tuple(tokens.shape)}"
        )
    options = operator_options(
        hidden,
        weight,
        tokens[..., 0],
        vocab_parallel=vocab_parallel,
        logits_transform=logits_transform,
        ignore_index=ignore_index,
        grad_precision=grad_precision,
        invariant=invariant,
        chunk_size=chunk_size,
        bias=bias,
    )
    # Any other number marks positions that count, also where 0 is a token that marks empty slots.
    positions = torch.where((tokens == ignore_index).all(-1), ignore_index, ignore_index + 1)
    inverse_temperature = inverse_temperature_of(temperature, positions, ignore_index)
    logprobs, logits, *others = apply_selected(hidden, weight, positions, tokens, inverse_temperature, options, bias)
    return SelectedLogprobs(logprobs, logits, tokens, *others[1:])


def linear_top_logprobs(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    vocab_parallel: VocabParallel | None = None,
    logits_transform: LogitsTransform | None = None,
    grad_precision: GradPrecision = "bf16",
    invariant: bool = False,
    chunk_size: int | None = None,
) -> SelectedLogprobs:
    """Log-probs of the `k` most probable tokens for every position, with a gradient; of equals the smaller token first.

    Takes the arguments of `linear_logprobs` that are not listed here, and:

    Args:
        hidden: [..., hidden], as for `linear_logprobs`.
        weight: [vocab / tp, hidden], as for `linear_logprobs`.
        k: 1 to the size of the vocabulary.
        mask: [...] bool: the positions that count, in the leading shape of (all ranks') `hidden`; None for all. The
            others have results of 0, and tokens of -1.

    Raises:
        As `linear_logprobs`.
    """
    check_count("k", k, least=1)
    ignore_index = -100
    positions = positions_of(hidden, mask, vocab_parallel, ignore_index)
    options = operator_options(
        hidden,
        weight,
        positions,
        vocab_parallel=vocab_parallel,
        logits_transform=logits_transform,
        ignore_index=ignore_index,
        grad_precision=grad_precision,
        invariant=invariant,
        chunk_size=chunk_size,
        top_k=k,
        bias=bias,
    )
    inverse_temperature = inverse_temperature_of(temperature, positions, ignore_index)
    return SelectedLogprobs(*apply_selected(hidden, weight, positions, None, inverse_temperature, options, bias))


@torch.compiler.disable
def apply_selected(
    hidden: Tensor,
    weight: Tensor,
    positions: Tensor,
    tokens: Tensor | None,
    inverse_temperature: Tensor,
    options: OperatorOptions,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Fields of `SelectedLogprobs`.

    Args:
        hidden: as for `linear_logprobs`.
        weight: as for `linear_logprobs`.
        positions: [...]: `ignore_index` for positions that do not count.
        tokens: [..., K]; None for the `top_k` of the options.
        inverse_temperature: [positions], from `inverse_temperature_of`.
        options: from `operator_options`.
        bias: [vocab / tp], or None.
    """
    return _Selected.apply(hidden, weight, positions, tokens, inverse_temperature, options, bias)


class _Selected(torch.autograd.Function):
    """Outputs are the fields of `SelectedLogprobs`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        positions: Tensor,
        tokens: Tensor | None,
        inverse_temperature: Tensor,
        options: OperatorOptions,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.weight_owner = options, weight
        flat = positions.reshape(-1)
        x = whole_hidden(hidden, weight, flat, options)
        given = None if tokens is None else tokens.reshape(len(x), tokens.shape[-1])
        chosen, statistics = _statistics(x, weight, bias, flat, given, inverse_temperature, options)
        slots = Slots.of(chosen, options.softmax)
        of = slot_softmax(statistics, slots)
        ctx.save_for_backward(hidden, weight, bias, flat, chosen, inverse_temperature, *statistics)
        empty = slots.ignored | slots.position_ignored[:, None]
        found = [
            torch.where(empty, 0.0, of.logprobs),
            torch.where(empty, 0.0, torch.where(slots.known, statistics.logits, torch.nan)),
            chosen if tokens is not None else chosen.masked_fill(empty, -1),
            *(torch.where(slots.position_ignored, 0.0, x) for x in (of.log_rest, of.entropy, of.logsumexp)),
        ]
        shapes = [(*positions.shape, chosen.shape[1])] * 3 + [tuple(positions.shape)] * 3
        # New tensors: a view that was made in here cannot be changed in place.
        outputs = [
            torch.empty(shape, dtype=y.dtype if y.dtype == torch.int64 else torch.float32, device=y.device).copy_(
                y.view(shape)
            )
            for y, shape in zip(found, shapes, strict=True)
        ]
        ctx.mark_non_differentiable(outputs[2])
        return tuple(outputs)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, positions, chosen, inverse_temperature, *saved = ctx.saved_tensors
        options: OperatorOptions = ctx.options
        check_operands(hidden, weight, names=("hidden", "weight"))
        slots, statistics = Slots.of(chosen, options.softmax), SlotStatistics(*saved)
        shapes = [tuple(chosen.shape)] * 3 + [(len(chosen),)] * 3
        of_logprobs, of_logits, _, *others = (
            None if x is None else x.reshape(shape) for x, shape in zip(upstream, shapes, strict=True)
        )
        grads = slot_gradient(
            statistics,
            slots,
            inverse_temperature,
            options.softmax,
            SlotUpstream(of_logprobs, of_logits, *others),
        )
        needs_hidden, needs_weight, *_, needs_bias = ctx.needs_input_grad
        x, local = whole_hidden(hidden, weight, positions, options), slots.local(options.softmax)
        found = operator_gradients(
            lambda rows: _SelectedGradient(x[rows], weight, bias, local[rows], _rows_of(grads, rows), options),
            x,
            hidden,
            weight,
            bias,
            live_tokens(grads.vectors),
            options,
            owner=ctx.weight_owner,
            needs=(needs_hidden, needs_weight, needs_bias),
        )
        return found.hidden, found.weight, None, None, None, None, found.bias


def _rows_of(grads: SlotGradient, rows: slice) -> SlotGradient:
    return SlotGradient(grads.vectors[:, rows], grads.elements[rows])


class _SelectedGradient(LogitsGradient):
    """dY of a block of positions: the kernel's, and the elements of the chosen tokens in their places.

    Args:
        hidden: [tokens, hidden].
        weight: [columns, hidden], this rank's rows.
        bias: [columns], or None.
        local: [tokens, K], the columns of the chosen tokens; -1 for those of other ranks.
        grads: from `slot_gradient`.
        options: of the operator.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        local: Tensor,
        grads: SlotGradient,
        options: OperatorOptions,
    ) -> None:
        no_label = torch.full((len(hidden),), -1, dtype=torch.int32, device=hidden.device)
        super().__init__(
            hidden, weight, labels=no_label, vectors=grads.vectors, kept=None, softmax=options.softmax,
            pieces=options.pieces_of(hidden, weight), bias=bias,
        )  # fmt: skip
        self._local = local
        self._elements = split_torch(grads.elements, self._pieces, self._dtype, self._scale)

    def __call__(self, rows: slice) -> Pieces:
        pieces = super().__call__(rows)
        if pieces.parts[0].numel() == 0:
            return pieces
        here = (self._local >= rows.start) & (self._local < rows.stop)
        # Slots of other columns repeat what one slot of these columns writes, or what is there.
        place = here.int().argmax(1, keepdim=True)
        none = ~here.any(1, keepdim=True)
        columns = torch.where(here, self._local, self._local.gather(1, place)) - rows.start
        columns = torch.where(none, 0, columns)
        for part, elements in zip(pieces.parts, self._elements, strict=True):
            values = torch.where(here, elements, elements.gather(1, place))
            part.scatter_(1, columns, torch.where(none, part[:, :1], values))
        return pieces


def _statistics(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    tokens: Tensor | None,
    inverse_temperature: Tensor,
    options: OperatorOptions,
) -> tuple[Tensor, SlotStatistics]:
    """The chosen tokens [tokens, K], and their statistics, from a chunk of products at a time."""
    softmax, k = options.softmax, options.top_k if tokens is None else tokens.shape[1]
    parts = []
    vocab = weight.shape[0]
    # The products, the finished logits, and float64 tensors of the slots.
    bytes_of_a_position = 8 * vocab + 160 * k + (0 if tokens is not None else bytes_of_a_token(vocab, k))
    for rows in stored_chunks(len(x), weight, options, bytes_of_a_position):
        count = rows.stop - rows.start
        # On the CPU all chunks have one size: see `token_statistics`.
        more = 0 if x.is_cuda else ROWS - count
        h, y = extended(x[rows], more, 0), extended(positions[rows], more, softmax.ignore_index)
        inverse = extended(inverse_temperature[rows], more, 1)
        if tokens is None:
            kept = KeptLogits.allocate(len(h), weight, with_tops=True)
            found = token_statistics(h, weight, y, inverse, softmax, mean="none", keep=kept, bias=bias)
            _, chosen = top_k_of(kept, torch.zeros_like(y), inverse, found, softmax, k)
            chosen = torch.where((y == softmax.ignore_index)[:, None], softmax.ignore_index, chosen)
            raw = kept.values
        else:
            chosen = extended(tokens[rows], more, softmax.ignore_index)
            fixed = softmax.invariant and why_not_fixed_order(h, weight) is None
            raw = logits_product(h, weight, bias, fixed_order=fixed)
        statistics = slot_statistics(raw, Slots.of(chosen, softmax), inverse, softmax)
        parts.append((chosen[:count], _rows(statistics, count)))
    chosen_parts, statistics_parts = zip(*parts, strict=True)
    columns = [None if f[0] is None else torch.cat(f) for f in zip(*statistics_parts, strict=True)]
    return torch.cat(chosen_parts), SlotStatistics(columns[0], columns[1], columns[2].t())  # type: ignore[union-attr,arg-type]


def _rows(statistics: SlotStatistics, count: int) -> tuple[Tensor | None, ...]:
    products = None if statistics.products is None else statistics.products[:count]
    return statistics.logits[:count], products, statistics.rest.t()[:count]
