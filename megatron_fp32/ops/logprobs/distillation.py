"""`linear_distillation`: divergence of a student from a teacher, without the logits of either.

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
from megatron_fp32.ops.logprobs.accumulate import operator_gradients
from megatron_fp32.ops.logprobs.distillation_forward import Forward, Operands, Plan, forward
from megatron_fp32.ops.logprobs.divergence import Divergence, Pair, TokenDivergence
from megatron_fp32.ops.logprobs.divergence_gradient import (
    divergence_gradient,
    divergence_scale,
    divergence_vectors,
    live_tokens,
)
from megatron_fp32.ops.logprobs.gradient import gradient_vectors
from megatron_fp32.ops.logprobs.options import inverse_temperature_of, operator_options, positions_of, whole_hidden
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.logprobs.statistics import TokenStatistics
from megatron_fp32.ops.products.grad_precision import GradPrecision
from megatron_fp32.ops.products.operands import check_operands, check_plain, check_shapes, piece_dtype
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.ops.products.split import Pieces


class Distillation(NamedTuple):
    """What `linear_distillation` returns: float32, one number for each token; 0 for a token that does not count."""

    divergence: Tensor
    """The weighted sum that `Divergence` describes, in nats."""
    logprobs: Tensor | None
    """The student's log p of the label, where labels are given."""
    entropy: Tensor
    """Of the student's distribution at `temperature`, in nats; without a gradient."""
    teacher_entropy: Tensor
    """Of the teacher's distribution at `temperature`, in nats; without a gradient."""


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    divergence: Divergence,
    temperature: float | Tensor = 1.0,
    labels: Tensor | None = None,
    label_temperature: float | Tensor = 1.0,
    mask: Tensor | None = None,
    ignore_index: int = -100,
    vocab_parallel: VocabParallel | None = None,
    logits_transform: LogitsTransform | None = None,
    teacher_logits_transform: LogitsTransform | None = None,
    grad_precision: GradPrecision = "bf16",
    chunk_size: int | None = None,
) -> Distillation:
    """Divergence of a student's distribution from a teacher's, of logits that are never stored.

    Both models' logits are `softcap * tanh(scale * hidden @ weight.T / softcap) / temperature` in fp32, without a bias,
    and exist for a chunk of tokens at a time. The backward pass multiplies both again. The divergence and the log-probs
    are differentiable with respect to `hidden` and `weight`; the teacher gets no gradient.

    A token that `mask` or `ignore_index` leaves out has 0 everywhere, and adds exactly 0 to every gradient, whatever
    its hidden states, label and temperature are; so does a token whose upstream gradients are all 0. A NaN among a
    token's logits, of either model, makes its divergence NaN. What is impossible for one model is not an error: a logit
    of minus infinity is a probability of 0, and the KL is infinite where its definition is. The gradient of an infinite
    divergence is NaN. A label that is neither in the vocabulary nor `ignore_index` makes the log-prob NaN, and the
    gradients that come from it, but not the divergence.

    Args:
        hidden: [..., hidden], the student's, as for `fp32_logits`.
        weight: [vocab / tp, hidden], the student's, as for `fp32_logits`, `main_grad` included.
        teacher_hidden: [..., teacher's hidden], the same tokens; without a gradient.
        teacher_weight: [vocab / tp, teacher's hidden], the same rows of the same vocabulary; without a gradient. The
            teacher's dtypes may differ from the student's.
        divergence: which divergences, with their weights.
        temperature: divides the logits of both models: a positive number, or one for every token, in the shape of the
            labels. The divergence is not multiplied by its square.
        labels: [...], integer: the leading shape of (all ranks') `hidden`. Every rank passes equal labels. With them
            the student's log-probs are returned, too, and their gradient is taken in the same backward pass.
        label_temperature: divides the student's logits for the log-probs, as `temperature` does for the divergence.
        mask: [...], bool, the leading shape of (all ranks') `hidden`: which tokens count. None for all of them.
        ignore_index: label of tokens that do not count, whatever the mask is.
        vocab_parallel: the tensor-parallel ranks, and how much of the vocabulary is padding, of both models; None for
            one process without padding. With its `sequence_parallel`, `hidden` and `teacher_hidden` are this rank's
            slices of dimension 0.
        logits_transform: the student's scale and soft cap; None for neither.
        teacher_logits_transform: the teacher's.
        grad_precision: see `Fp32Config.grad_precision`.
        chunk_size: tokens at a time; None chooses by the free memory.

    Returns:
        See `Distillation`.

    Raises:
        TypeError: for operand dtypes that `fp32_logits` refuses, labels that are not integers, a mask that is not bool,
            and arguments of another type.
        ValueError: for shapes that do not match, a teacher that requires a gradient while gradients are enabled, values
            outside of what an argument allows, a `label_temperature` without labels, or ranks with different numbers of
            rows of the weight.
    """
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence must be a Divergence, got {divergence!r}")
    transform = LogitsTransform() if teacher_logits_transform is None else teacher_logits_transform
    if not isinstance(transform, LogitsTransform):
        raise TypeError(f"teacher_logits_transform must be a LogitsTransform or None, got {transform!r}")
    if labels is None and not (isinstance(label_temperature, int | float) and label_temperature == 1):
        raise ValueError("label_temperature divides the logits for the log-probs of labels: expected labels, got None")
    _check_teacher(hidden, weight, teacher_hidden, teacher_weight)
    marks = _marks(hidden, labels, mask, ignore_index, vocab_parallel)
    options = operator_options(
        hidden,
        weight,
        marks,
        vocab_parallel=vocab_parallel,
        logits_transform=logits_transform,
        ignore_index=ignore_index,
        grad_precision=grad_precision,
        invariant=False,
        chunk_size=chunk_size,
    )
    inverse = inverse_temperature_of(temperature, marks, ignore_index)
    label_inverse = inverse_temperature_of(label_temperature, marks, ignore_index)
    plan = Plan(
        options=options,
        pair=Pair(
            student=options.softmax,
            teacher=dataclasses.replace(options.softmax, transform=transform),
            divergence=divergence,
        ),
        with_labels=labels is not None,
        same_temperature=_same(temperature, label_temperature),
    )
    return _eager(hidden, weight, teacher_hidden, teacher_weight, marks, inverse, label_inverse, plan)


def _check_teacher(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> None:
    """What can be told before ranks talk to each other."""
    check_shapes(hidden, weight)
    check_operands(teacher_hidden, teacher_weight, names=("teacher_hidden", "teacher_weight"))
    expected, found = (*hidden.shape[:-1], weight.shape[0]), (*teacher_hidden.shape[:-1], teacher_weight.shape[0])
    if teacher_weight.dim() != 2 or teacher_hidden.shape[-1:] != teacher_weight.shape[1:] or expected != found:
        raise ValueError(
            f"expected teacher_hidden {(*hidden.shape[:-1], 'h')} and teacher_weight {(weight.shape[0], 'h')} for "
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}, got {tuple(teacher_hidden.shape)} and "
            f"{tuple(teacher_weight.shape)}"
        )
    if torch.is_grad_enabled() and (teacher_hidden.requires_grad or teacher_weight.requires_grad):
        raise ValueError(
            "the teacher gets no gradient: expected teacher_hidden and teacher_weight without requires_grad, got "
            f"{teacher_hidden.requires_grad} and {teacher_weight.requires_grad}. Pass teacher_hidden.detach() and "
            "teacher_weight.detach()"
        )


def _same(temperature: float | Tensor, other: float | Tensor) -> bool:
    """Whether these can be told to be equal without looking into a tensor."""
    if isinstance(temperature, Tensor) or isinstance(other, Tensor):
        return temperature is other
    return temperature == other


def _marks(
    hidden: Tensor, labels: Tensor | None, mask: Tensor | None, ignore_index: int, vocab_parallel: VocabParallel | None
) -> Tensor:
    """The labels, where there are any; `ignore_index` for tokens that do not count."""
    if labels is None:
        return positions_of(hidden, mask, vocab_parallel, ignore_index)
    if mask is None:
        return labels
    check_plain(labels=labels)
    positions = positions_of(hidden, mask, vocab_parallel, ignore_index)
    return torch.where(positions == ignore_index, ignore_index, labels)


@torch.compiler.disable
def _eager(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    label_inverse_temperature: Tensor,
    plan: Plan,
) -> Distillation:
    return Distillation(
        *_LinearDistillation.apply(
            hidden, weight, teacher_hidden, teacher_weight, labels, inverse_temperature, label_inverse_temperature, plan
        )
    )


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        inverse_temperature: Tensor,
        label_inverse_temperature: Tensor,
        plan: Plan,
    ) -> tuple[Tensor | None, ...]:
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.weight_owner = plan, weight
        flat = labels.reshape(-1)
        given = (hidden, weight, teacher_hidden, teacher_weight, flat, inverse_temperature, label_inverse_temperature)
        found = forward(_operands(given, plan), plan)
        of_labels = () if found.labels is None else found.labels[:5]
        ctx.save_for_backward(*given, *found.divergence, *of_labels)
        outputs = _outputs(found, labels)
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        saved, plan = ctx.saved_tensors, ctx.plan
        given, of_tokens, of_labels = saved[:7], saved[7 : 7 + len(TokenDivergence._fields)], saved[-5:]
        hidden, weight, teacher_hidden, teacher_weight, labels, inverse_temperature, label_inverse = given
        # TF32 may have been switched on since the forward pass.
        check_operands(hidden, weight, names=("hidden", "weight"))
        check_operands(teacher_hidden, teacher_weight, names=("teacher_hidden", "teacher_weight"))
        g, of_logprob = (None if x is None else x.reshape(-1).float() for x in upstream[:2])
        label_vectors = None
        if of_logprob is not None:
            label_vectors = gradient_vectors(
                TokenStatistics(*of_labels, mean=None), label_inverse, plan.pair.student, labels,
                logprob=of_logprob, entropy=None, logsumexp=None, mean=None, mean_of="none",
            )  # fmt: skip
        if g is not None:
            g = torch.where(labels == plan.pair.student.ignore_index, 0.0, g)
        vectors = divergence_vectors(TokenDivergence(*of_tokens), inverse_temperature, g, plan.pair, label_vectors)
        operands, live = _operands(given, plan), live_tokens(vectors)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grads = operator_gradients(
            lambda rows: _DivergenceGradient(operands.rows(rows), vectors[:, rows], plan),
            operands.hidden,
            hidden,
            weight,
            None,
            live,
            plan.options,
            owner=ctx.weight_owner,
            needs=(needs_hidden, needs_weight, False),
            products=2,
        )
        return grads.hidden, grads.weight, *([None] * 6)


def _operands(given: tuple[Tensor, ...], plan: Plan) -> Operands:
    """Of all ranks' tokens, from what the operator was called with."""
    hidden, weight, teacher_hidden, teacher_weight, labels, inverse_temperature, label_inverse_temperature = given
    return Operands(
        hidden=whole_hidden(hidden, weight, labels, plan.options),
        weight=weight,
        teacher_hidden=whole_hidden(teacher_hidden, teacher_weight, labels, plan.options),
        teacher_weight=teacher_weight,
        labels=labels,
        inverse_temperature=inverse_temperature,
        label_inverse_temperature=label_inverse_temperature,
    )


def _outputs(found: Forward, labels: Tensor) -> tuple[Tensor | None, ...]:
    """New tensors: an output must not be what the backward pass reads, nor a view that cannot be changed in place."""
    logprobs = None if found.labels is None else found.labels.logprob
    fields = (found.divergence.value, logprobs, found.entropy, found.teacher_entropy)
    return tuple(
        None if x is None else torch.empty(labels.shape, dtype=x.dtype, device=x.device).copy_(x.view(labels.shape))
        for x in fields
    )


class _DivergenceGradient:
    """dY of a block of tokens, columns at a time: a `BlockGradient`."""

    def __init__(self, operands: Operands, vectors: Tensor, plan: Plan) -> None:
        self._operands, self._vectors, self._pair = operands, vectors.contiguous(), plan.pair
        self._pieces = plan.options.pieces_of(operands.hidden, operands.weight)
        self._dtype = piece_dtype(operands.hidden.dtype, operands.weight.dtype)
        self._labels = plan.pair.student.shard.local_labels(operands.labels)
        self._scale = divergence_scale(self._vectors, plan.pair, count=self._pieces, dtype=self._dtype)

    def bounds(self) -> Tensor:
        """Only an invariant dX needs them."""
        raise AssertionError("the divergence has no invariant dX")

    def __call__(self, rows: slice) -> Pieces:
        """[tokens, columns] in pieces."""
        return divergence_gradient(
            *self._operands.products(rows),
            self._vectors,
            self._labels,
            self._pair,
            first=rows.start,
            count=self._pieces,
            dtype=self._dtype,
            scale=self._scale,
        )
