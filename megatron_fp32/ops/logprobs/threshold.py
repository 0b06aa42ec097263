"""The softmax over the tokens whose log-prob is not below a threshold.

The kept tokens depend on the logits. The backward pass must find the same ones, so it takes the products of the same
tokens with the same columns at a time as the forward pass: a library may choose another order of summation for another
shape, and a token on the edge would be kept in one pass and not in the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logprobs.accumulate import (
    LogitsGradient,
    operator_gradients,
)
from megatron_fp32.ops.logprobs.gradient import gradient_vectors, live_tokens
from megatron_fp32.ops.logprobs.options import OperatorOptions, whole_hidden
from megatron_fp32.ops.logprobs.softmax import Softmax
from megatron_fp32.ops.logprobs.statistics import (
    KeptLogits,
    TokenStatistics,
    finish,
    over_ranks,
    stored_statistics,
)
from megatron_fp32.ops.logprobs.tokens import join, stored_chunks
from megatron_fp32.ops.products.chunks import extended
from megatron_fp32.ops.products.fixed_order import ROWS, why_not_fixed_order
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.operands import check_operands


@torch.compiler.disable
def apply_threshold(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    min_logprob: Tensor,
    options: OperatorOptions,
    bias: Tensor | None,
) -> tuple[Tensor, ...]:
    """Log-prob of the label, entropy and mass, in the shape of the labels; `min_logprob` [tokens] float32."""
    return _Threshold.apply(hidden, weight, labels, inverse_temperature, min_logprob, options, bias)


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        inverse_temperature: Tensor,
        min_logprob: Tensor,
        options: OperatorOptions,
        bias: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.weight_owner = options, weight
        softmax, flat = options.softmax, labels.reshape(-1)
        x = whole_hidden(hidden, weight, flat, options)
        # The products, logits, kept and dropped ones, and what torch needs on the way to them.
        ctx.chunks = stored_chunks(len(x), weight, options, 20 * weight.shape[0])
        parts, cuts, masses = [], [], []
        for rows in ctx.chunks:
            more = 0 if x.is_cuda else ROWS - (rows.stop - rows.start)
            raw = _products(x[rows], weight, bias, more, softmax)
            y, inverse = extended(flat[rows], more, softmax.ignore_index), extended(inverse_temperature[rows], more, 1)
            whole = _finished(raw, y, inverse, softmax)
            cut = whole.top + (whole.log_sum + extended(min_logprob[rows], more, 0))
            z = softmax.finished_logits(raw, inverse)
            dropped = _dropped(z, y, cut, softmax)
            of_dropped = _mass(z.masked_fill(~dropped, -torch.inf), whole, softmax)
            kept = _finished(
                z.masked_fill_(dropped, -torch.inf), y, torch.ones_like(inverse), softmax.of_finished_logits
            )
            difference = (kept.top - whole.top) + (kept.log_sum - whole.log_sum)
            # Where most is kept, what is left out has more digits than the difference.
            mass = torch.where(of_dropped < 0.5, (-of_dropped).log1p(), difference)
            mass = mass.masked_fill(y == softmax.ignore_index, 0.0)
            count = rows.stop - rows.start
            # No logit is below NaN, so that a threshold of NaN would keep all.
            wrong = cut.isnan() & (y != softmax.ignore_index)
            parts.append(
                TokenStatistics(*(None if f is None else f.masked_fill(wrong, torch.nan)[:count] for f in kept))  # type: ignore[arg-type]
            )
            cuts.append(cut[:count])
            masses.append(mass.masked_fill(wrong, torch.nan)[:count])
        statistics = join(parts)
        ctx.save_for_backward(hidden, weight, bias, flat, inverse_temperature, torch.cat(cuts), *statistics)
        found = (statistics.logprob, statistics.entropy, torch.cat(masses))
        outputs = [torch.empty(labels.shape, device=y.device).copy_(y.view(labels.shape)) for y in found]
        ctx.mark_non_differentiable(outputs[2])
        return tuple(outputs)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, logprob: Tensor | None, entropy: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, inverse_temperature, cuts, *saved = ctx.saved_tensors
        options: OperatorOptions = ctx.options
        check_operands(hidden, weight, names=("hidden", "weight"))
        softmax = options.softmax
        vectors = gradient_vectors(
            TokenStatistics(*saved),
            inverse_temperature,
            softmax,
            labels,
            logprob=None if logprob is None else logprob.reshape(-1).float(),
            entropy=None if entropy is None else entropy.reshape(-1).float(),
            logsumexp=None,
            mean=None,
            mean_of="none",
        )
        x = whole_hidden(hidden, weight, labels, options)

        def gradient_of(rows: slice) -> LogitsGradient:
            more = 0 if x.is_cuda else ROWS - (rows.stop - rows.start)
            raw = _products(x[rows], weight, bias, more, softmax)[: rows.stop - rows.start]
            return LogitsGradient(
                x[rows], weight, labels=softmax.shard.local_labels(labels[rows]), vectors=vectors[:, rows],
                kept=KeptLogits(values=raw, tops=None), cuts=cuts[rows], consume=True, softmax=softmax,
                pieces=options.pieces_of(x, weight),
            )  # fmt: skip

        needs_hidden, needs_weight, *_, needs_bias = ctx.needs_input_grad
        grads = operator_gradients(
            gradient_of,
            x,
            hidden,
            weight,
            bias,
            live_tokens(vectors),
            options,
            owner=ctx.weight_owner,
            needs=(needs_hidden, needs_weight, needs_bias),
            products=0,
            blocks=ctx.chunks,
        )
        return grads.hidden, grads.weight, None, None, None, None, grads.bias


def _products(hidden: Tensor, weight: Tensor, bias: Tensor | None, more: int, softmax: Softmax) -> Tensor:
    """[tokens + more, columns] float32, rows aligned to 16 bytes: the CPU has one shape for all chunks."""
    x = extended(hidden, more, 0)
    fixed = softmax.invariant and why_not_fixed_order(x, weight) is None
    return logits_product(x, weight, bias, fixed_order=fixed)


def _finished(raw: Tensor, labels: Tensor, inverse: Tensor, softmax: Softmax) -> TokenStatistics:
    """Over the whole vocabulary, of products that are there."""
    statistics, label_logits = stored_statistics(raw, softmax.shard.local_labels(labels), inverse, softmax, mean="none")
    return finish(*over_ranks(statistics, label_logits, softmax), labels, softmax)


def _dropped(z: Tensor, labels: Tensor, cut: Tensor, softmax: Softmax) -> Tensor:
    """[tokens, columns] bool: logits below `cut` [tokens], but for the label's. A NaN is not below."""
    columns = torch.arange(z.shape[1], device=z.device)
    return (z < cut[:, None]) & (columns != softmax.shard.local_labels(labels)[:, None])


def _mass(z: Tensor, whole: TokenStatistics, softmax: Softmax) -> Tensor:
    """[tokens]: the probability of the logits that are not -inf, under the whole distribution."""
    no_label = torch.full((len(z),), -1, dtype=torch.int32, device=z.device)
    one, plain = torch.ones_like(whole.top), softmax.of_finished_logits
    statistics, _ = over_ranks(*stored_statistics(z, no_label, one, plain, mean="none"), softmax)
    top, total, _ = statistics[0]
    return total * ((top - whole.top) - whole.log_sum).exp()
