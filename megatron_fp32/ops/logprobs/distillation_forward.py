"""Divergences of any number of tokens, a chunk at a time: the products of both models, and what is summed of them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs import workspace
from megatron_fp32.ops.logprobs.divergence import Pair, TokenDivergence, finish, sums_torch
from megatron_fp32.ops.logprobs.options import OperatorOptions
from megatron_fp32.ops.logprobs.softmax import FIELDS, Softmax
from megatron_fp32.ops.logprobs.statistics import TokenStatistics, over_ranks, statistics_torch
from megatron_fp32.ops.logprobs.statistics import finish as finish_statistics
from megatron_fp32.ops.logprobs.tokens import join
from megatron_fp32.ops.products.chunks import even_chunks
from megatron_fp32.ops.products.fixed_order import ROWS
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.ranks import gather_first_dim
from megatron_fp32.ops.products.shard import BLOCK, Shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the operator computes and how, from arguments that were checked."""

    options: OperatorOptions
    """Of the student."""
    pair: Pair
    """Its softmax, the teacher's, and the divergence."""
    with_labels: bool
    """Also the labels' log-probs."""
    same_temperature: bool
    """They are at the divergence's temperature."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """Tensors of all ranks' tokens."""

    hidden: Tensor
    """[tokens, hidden] of the student."""
    weight: Tensor
    """[columns, hidden], this rank's rows."""
    teacher_hidden: Tensor
    """[tokens, teacher's hidden]."""
    teacher_weight: Tensor
    """[columns, teacher's hidden], the same rows."""
    labels: Tensor
    """[tokens], indices into the whole vocabulary, or `ignore_index` for a token that does not count."""
    inverse_temperature: Tensor
    """[tokens] float32, of the divergence."""
    label_inverse_temperature: Tensor
    """[tokens] float32, of the log-probs."""

    def rows(self, tokens: slice) -> Operands:
        """Those of some tokens."""
        cut = {
            field.name: getattr(self, field.name)[tokens]
            for field in dataclasses.fields(self)
            if field.name not in ("weight", "teacher_weight")
        }
        return dataclasses.replace(self, **cut)

    def products(self, columns: slice) -> tuple[Tensor, Tensor]:
        """Of the student and of the teacher, [tokens, columns] float32 each."""
        return (
            logits_product(self.hidden, self.weight[columns]),
            logits_product(self.teacher_hidden, self.teacher_weight[columns]),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """Everything that is known of the tokens."""

    divergence: TokenDivergence
    labels: TokenStatistics | None
    """At the labels' temperature; None without labels."""
    entropy: Tensor
    """[tokens] float32, of the student at the divergence's temperature."""
    teacher_entropy: Tensor
    """[tokens] float32."""


def forward(operands: Operands, plan: Plan) -> Forward:
    """Of all tokens. Every rank takes part in every call, with equally many."""
    device = operands.weight.device
    largest = plan.options.chunk_size
    if largest is None:
        room = workspace.workspace_bytes(device, parallel=plan.pair.student.shard.group is not None)
        # The products of both models.
        largest = max(1, room // (8 * operands.weight.shape[0]))
    if device.type != "cuda":
        # The definitions in torch take several tensors of this size.
        largest = min(largest, ROWS)
    chunks = even_chunks(len(operands.labels), largest) or [slice(0, 0)]
    parts = [_of_chunk(operands.rows(tokens), plan) for tokens in chunks]
    if len(parts) == 1:
        return parts[0]
    divergences = TokenDivergence(*(torch.cat(field) for field in zip(*(x.divergence for x in parts), strict=True)))
    labels = None
    if plan.with_labels:
        labels = join([x.labels for x in parts if x.labels is not None])
    return Forward(
        divergence=divergences,
        labels=labels,
        entropy=torch.cat([x.entropy for x in parts]),
        teacher_entropy=torch.cat([x.teacher_entropy for x in parts]),
    )


def _of_chunk(operands: Operands, plan: Plan) -> Forward:
    pair, labels, inverse = plan.pair, operands.labels, operands.inverse_temperature
    raw, teacher_raw = operands.products(slice(None))
    student = _statistics(raw, labels, inverse, pair.student)
    teacher = _statistics(teacher_raw, labels, inverse, pair.teacher)
    of_labels = None
    if plan.with_labels:
        own_inverse = operands.label_inverse_temperature
        of_labels = student if plan.same_temperature else _statistics(raw, labels, own_inverse, pair.student)
    shift = teacher.log_sum - student.log_sum
    vectors = torch.stack([student.top, student.log_sum, inverse, teacher.top, teacher.log_sum, shift])
    sums = _over_ranks(block_sums(raw, teacher_raw, vectors, pair), pair.student.shard)
    ignored = labels == pair.student.ignore_index
    finished = (torch.where(ignored, 0.0, field) for field in finish(sums, pair.divergence))
    return Forward(
        divergence=TokenDivergence(
            student.top, student.log_sum, teacher.top, teacher.log_sum, shift, *finished
        ),
        labels=of_labels,
        entropy=student.entropy,
        teacher_entropy=teacher.entropy,
    )  # fmt: skip


def _statistics(raw: Tensor, labels: Tensor, inverse_temperature: Tensor, softmax: Softmax) -> TokenStatistics:
    """Of stored products [tokens, columns]."""
    tokens, columns = raw.shape
    statistics = raw.new_empty(-(-columns // BLOCK), FIELDS["none"], tokens)
    label_logits, local = raw.new_zeros(tokens), softmax.shard.local_labels(labels)
    if raw.is_cuda:
        from megatron_fp32.ops.logprobs.kernels import statistics_triton

        with torch.cuda.device(raw.device):
            statistics_triton(raw, local, inverse_temperature, softmax, statistics, label_logits)
    else:
        statistics_torch(raw, local, inverse_temperature, softmax, statistics, label_logits)
    return finish_statistics(*over_ranks(statistics, label_logits, softmax), labels, softmax)


def block_sums(raw: Tensor, teacher_raw: Tensor, vectors: Tensor, pair: Pair) -> Tensor:
    """[blocks, fields, tokens] float32, the sums that `divergence.finish` needs, over each block of columns.

    Args:
        raw: [tokens, columns] float32, the student's products.
        teacher_raw: [tokens, columns] float32.
        vectors: [6, tokens] float32: top, log_sum, inverse temperature, the teacher's top and log_sum, shift.
        pair: whose divergence.
    """
    if raw.is_cuda:
        from megatron_fp32.ops.logprobs.distillation_kernels import sums_triton

        with torch.cuda.device(raw.device):
            return sums_triton(raw, teacher_raw, vectors, pair)
    return sums_torch(raw, teacher_raw, vectors, pair)


def _over_ranks(sums: Tensor, shard: Shard) -> Tensor:
    """[fields, tokens] float64 over the whole vocabulary; ranks are added in their order, on every rank alike."""
    mine = sums.sum(0, dtype=torch.float64)
    if shard.group is None:
        return mine
    every = gather_first_dim(mine, shard.group).view(shard.ranks, *mine.shape)
    total = every[0]
    for rank in range(1, shard.ranks):
        total = total + every[rank]
    return total
