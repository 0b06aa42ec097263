"""`linear_logprobs`: log-probabilities and entropy of the output layer without `[tokens, vocab]` in memory.

What is rounded, and where: nothing in the forward pass; in the backward pass what `fp32_logits` rounds: dY enters with
as many bits as `grad_precision` says, dX is summed over the ranks in fp32 and rounded once, dW stays fp32 on its way to
`main_grad`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_fp32.ops.first_order import first_order_only
from megatron_fp32.ops.logprobs import custom_op
from megatron_fp32.ops.logprobs.options import (
    Backward,
    OperatorOptions,
    inverse_temperature_of,
    operator_options,
)
from megatron_fp32.ops.logprobs.passes import Results, Saved, backward_pass, forward_pass
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.logprobs.statistics import TokenStatistics
from megatron_fp32.ops.products.grad_precision import GradPrecision
from megatron_fp32.ops.products.main_grad import follows_main_grad
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.ops.traced import is_traced
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


def apply_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    options: OperatorOptions,
    bias: Tensor | None = None,
) -> Results:
    """Log-probs and what else the options ask for.

    Args:
        hidden: as for `linear_logprobs`.
        weight: as for `linear_logprobs`.
        labels: as for `linear_logprobs`.
        inverse_temperature: [tokens], from `inverse_temperature_of`.
        options: from `operator_options`.
        bias: as for `linear_logprobs`.
    """
    # Inside of forward, gradients are off in any case.
    if not torch.is_grad_enabled():
        options = dataclasses.replace(options, keep_logits=False)
    if is_traced(weight) and not follows_main_grad(weight):
        return custom_op.apply(hidden, weight, bias, labels, inverse_temperature, options)
    return _eager(hidden, weight, labels, inverse_temperature, options, bias)


@torch.compiler.disable
def _eager(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    options: OperatorOptions,
    bias: Tensor | None,
) -> Results:
    return Results(*_LinearLogprobs.apply(hidden, weight, labels, inverse_temperature, options, bias))


class _LinearLogprobs(torch.autograd.Function):
    """Outputs are the fields of `Results`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        inverse_temperature: Tensor,
        options: OperatorOptions,
        bias: Tensor | None,
    ) -> Results:
        ctx.set_materialize_grads(False)
        ctx.options, ctx.weight_owner = options, weight
        keep = options.keep_logits and any(ctx.needs_input_grad)
        results, saved = forward_pass(hidden, weight, bias, labels, inverse_temperature, options, keep=keep)
        ctx.save_for_backward(hidden, weight, bias, labels, inverse_temperature, saved.logits, *saved.statistics[:6])
        discrete = (results.top_logprobs, results.top_tokens, results.correct)
        ctx.mark_non_differentiable(*(x for x in discrete if x is not None))
        return results

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, labels, inverse_temperature, logits, *statistics = ctx.saved_tensors
        needs_hidden, needs_weight, *_, needs_bias = ctx.needs_input_grad
        grads = backward_pass(
            upstream[:4],
            hidden,
            weight,
            bias,
            labels,
            inverse_temperature,
            Saved(TokenStatistics(*statistics), logits),
            ctx.options,
            owner=ctx.weight_owner,
            needs=(needs_hidden, needs_weight, needs_bias),
        )
        return grads.hidden, grads.weight, None, None, None, grads.bias
