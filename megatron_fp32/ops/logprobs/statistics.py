"""What a softmax needs of its logits, block by block, and how blocks and ranks are put together.

For each token and block of `BLOCK` columns: the maximum m and the sums of e = exp(z - m) and of e * (z - m). The label
is left out of all three. The statistics of two blocks combine into the statistics of their union, so one function
serves for the blocks of a shard and for the shards of all ranks. Without the label, 1 - p is a sum of small numbers and
log p the log1p of one. Taken from p = 0.9999, both would have lost their digits.

For a mean over the vocabulary (`Mean`) there is more. For the mean of the logits: the sum of z, with the label. For the
mean of the log-probs: the sum of z - m and the number of its terms, without the label. The mean log-prob must not be
taken from the mean logit: far from zero, its difference to the logsumexp would have lost its digits.

A NaN among a token's logits makes these sums NaN, whatever the maximum is, and with them all results of the token.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs.softmax import FIELDS, Mean, Softmax
from megatron_fp32.ops.products.fixed_order import aligned, why_not_fixed_order
from megatron_fp32.ops.products.forward import logits_product
from megatron_fp32.ops.products.ranks import gather_first_dim
from megatron_fp32.ops.products.shard import BLOCK

_LANES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeptLogits:
    """Logits of some tokens, kept for their gradient."""

    values: Tensor
    """[tokens, columns], rows aligned to 16 bytes: products in float32; or, in float16, exp(z - top of the block)."""
    tops: Tensor | None
    """[blocks, tokens] float32, the maxima: of the exponentials those that they refer to, without the label; of
    products, kept for `top_k_of`, with it. float16 has 11 bits down to 6e-5 of the maximum, 8 times finer than the
    bfloat16 that dY will be rounded to, and steps of 6e-8 of it below."""

    @staticmethod
    def allocate(tokens: int, weight: Tensor, *, exponentials: bool = False, with_tops: bool = False) -> KeptLogits:
        """Room for the logits of `tokens` tokens; `exponentials` come with their tops."""
        columns, device = weight.shape[0], weight.device
        width = -(-columns // 8) * 8
        dtype = torch.float16 if exponentials else torch.float32
        blocks = -(-columns // BLOCK)
        return KeptLogits(
            values=torch.empty(tokens, width, dtype=dtype, device=device)[:, :columns],
            tops=torch.empty(blocks, tokens, dtype=torch.float32, device=device) if exponentials or with_tops else None,
        )

    def rows(self, tokens: slice) -> KeptLogits:
        """The logits of some of the tokens."""
        return KeptLogits(values=self.values[tokens], tops=None if self.tops is None else self.tops[:, tokens])


class TokenStatistics(NamedTuple):
    """Of each token, over the whole vocabulary: [tokens] float32 each."""

    top: Tensor
    """The largest logit. This and all other fields are 0 for an ignored label."""
    log_sum: Tensor
    """log of the sum of exp(z - top)."""
    logprob: Tensor
    """log p of the label; NaN for a label outside of the vocabulary."""
    rest: Tensor
    """1 - p of the label; NaN for a label outside of the vocabulary."""
    entropy: Tensor
    """In nats."""
    mean: Tensor | None
    """Mean over the vocabulary of what `Mean` says."""
    correct: Tensor | None = None
    """bool, where asked for: whether no other logit is larger than the label's, and none is NaN; False for an ignored
    label."""

    @property
    def logsumexp(self) -> Tensor:
        """log of the sum of exp(z)."""
        return self.top + self.log_sum


def block_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    softmax: Softmax,
    *,
    mean: Mean,
    keep: KeptLogits | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multiply, and take the statistics of every block of this shard.

    Args:
        hidden: [tokens, hidden], not empty.
        weight: [columns, hidden].
        labels: [tokens] int32, from `Shard.local_labels`.
        inverse_temperature: [tokens] float32.
        softmax: over the vocabulary, with this rank's columns.
        mean: also take the statistics that this mean needs.
        keep: room for the logits; None to forget them.
        bias: [columns], added to the products in fp32; the products are stored for it.

    Returns:
        The statistics, [blocks, fields, tokens] float32, and the labels' logits, [tokens] float32, 0 for other shards'.
    """
    tokens, columns = hidden.shape[0], weight.shape[0]
    fixed = why_not_fixed_order(hidden, weight) is None
    if fixed and hidden.is_cuda and bias is None:
        statistics = torch.empty(-(-columns // BLOCK), FIELDS[mean], tokens, dtype=torch.float32, device=hidden.device)
        label_logits = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
        from megatron_fp32.ops.products.project_triton import project_triton

        with torch.cuda.device(hidden.device):
            project_triton(
                aligned(hidden),
                weight,
                logits=None if keep is None else keep.values,
                statistics=statistics,
                labels=labels,
                label_logits=label_logits,
                inverse_temperature=inverse_temperature,
                valid_columns=softmax.shard.valid_columns,
                scale=softmax.transform.scale,
                softcap=softmax.transform.softcap,
            )
        _keep_tops(keep, statistics, labels, label_logits)
        return statistics, label_logits
    raw = logits_product(hidden, weight, bias, fixed_order=fixed)
    if keep is not None:
        assert keep.values.dtype == torch.float32
        keep.values.copy_(raw)
    statistics, label_logits = stored_statistics(raw, labels, inverse_temperature, softmax, mean=mean)
    _keep_tops(keep, statistics, labels, label_logits)
    return statistics, label_logits


def stored_statistics(
    raw: Tensor, labels: Tensor, inverse_temperature: Tensor, softmax: Softmax, *, mean: Mean
) -> tuple[Tensor, Tensor]:
    """As `block_statistics`, of products [tokens, columns] float32 that are there."""
    tokens, columns = raw.shape
    statistics = torch.empty(-(-columns // BLOCK), FIELDS[mean], tokens, dtype=torch.float32, device=raw.device)
    label_logits = torch.zeros(tokens, dtype=torch.float32, device=raw.device)
    if raw.is_cuda:
        from megatron_fp32.ops.logprobs.kernels import statistics_triton

        with torch.cuda.device(raw.device):
            statistics_triton(raw, labels, inverse_temperature, softmax, statistics, label_logits)
    else:
        statistics_torch(raw, labels, inverse_temperature, softmax, statistics, label_logits)
    return statistics, label_logits


def _keep_tops(keep: KeptLogits | None, statistics: Tensor, labels: Tensor, label_logits: Tensor) -> None:
    if keep is None or keep.tops is None:
        return
    keep.tops.copy_(statistics[:, 0])
    if keep.values.dtype == torch.float32:
        block = (labels.clamp(min=0) // BLOCK).long()[None]
        own = torch.where(labels >= 0, label_logits, -torch.inf)[None]
        keep.tops.scatter_(0, block, keep.tops.gather(0, block).maximum(own))


def statistics_torch(
    raw: Tensor, labels: Tensor, inverse_temperature: Tensor, softmax: Softmax, statistics: Tensor, label_logits: Tensor
) -> None:
    """The definition, in torch operators; results in the last two arguments."""
    for index, column in enumerate(range(0, raw.shape[1], BLOCK)):
        z = raw.new_full((raw.shape[0], BLOCK), -torch.inf)
        width = min(BLOCK, max(0, min(raw.shape[1], softmax.shard.valid_columns) - column))
        z[:, :width] = softmax.logits(raw[:, column : column + width], inverse_temperature)
        is_label = torch.arange(BLOCK, device=raw.device) == (labels - column)[:, None]
        others = z.masked_fill(is_label, -torch.inf)
        top = others.amax(1)
        distance = others - torch.where(top.isneginf(), 0.0, top)[:, None]
        e = distance.exp()
        valid = torch.arange(BLOCK, device=raw.device) < width
        statistics[index, 0] = top
        statistics[index, 1] = _tree_sum(e)
        statistics[index, 2] = _tree_sum(torch.where(e == 0, 0.0, e * distance))
        if statistics.shape[1] == FIELDS["logit"]:
            statistics[index, 3] = _tree_sum(torch.where(valid, z, 0.0))
        if statistics.shape[1] == FIELDS["logprob"]:
            rivals = valid & ~is_label
            statistics[index, 3] = _tree_sum(torch.where(rivals, distance, 0.0))
            statistics[index, 4] = rivals.sum(1)
        label_logits += torch.where(is_label, z, 0.0).sum(1)


def _tree_sum(x: Tensor) -> Tensor:
    """Sum over dimension 1, a power of two long, in an order that torch does not choose."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def combine(statistics: Tensor) -> Tensor:
    """[1, fields, tokens] of [blocks, fields, tokens].

    Block b is added in lane b mod `_LANES`: blocks of padding at the end, which are zeros, change no bit of it.
    """
    if statistics.is_cuda:
        from megatron_fp32.ops.logprobs.kernels import combine_triton

        with torch.cuda.device(statistics.device):
            return combine_triton(statistics)
    return combine_torch(statistics)


def combine_torch(statistics: Tensor) -> Tensor:
    """The definition of `combine`."""
    top = statistics[:, 0].amax(0)
    lanes = statistics.new_zeros(_LANES, statistics.shape[1] - 1, statistics.shape[2])
    for group in statistics.split(_LANES):
        distance = group[:, 0] - torch.where(top.isneginf(), 0.0, top)
        factor = distance.exp()
        lanes[: len(group), 0] += group[:, 1] * factor
        weighted = (group[:, 2] + group[:, 1] * distance) * factor
        lanes[: len(group), 1] += torch.where(factor == 0, 0.0, weighted)
        if statistics.shape[1] == FIELDS["logit"]:
            lanes[: len(group), 2] += group[:, 3]
        if statistics.shape[1] == FIELDS["logprob"]:
            # From each block's maximum to the maximum of all blocks.
            lanes[: len(group), 2] += group[:, 3] + torch.where(group[:, 4] == 0, 0.0, group[:, 4] * distance)
            lanes[: len(group), 3] += group[:, 4]
    while len(lanes) > 1:
        lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
    return torch.cat([top[None, None], lanes], 1)


def over_ranks(statistics: Tensor, label_logits: Tensor, softmax: Softmax) -> tuple[Tensor, Tensor]:
    """Statistics of the whole vocabulary, [1, fields, tokens], and the labels' logits, from this shard's blocks."""
    if not softmax.invariant or softmax.shard.group is None:
        statistics = combine(statistics)
    if softmax.shard.group is None:
        return statistics, label_logits
    blocks, fields, tokens = statistics.shape
    mine = torch.cat([statistics.view(blocks * fields, tokens), label_logits[None]])
    every = gather_first_dim(mine, softmax.shard.group).view(softmax.shard.ranks, *mine.shape)
    # One rank has each label, the others a zero.
    return combine(every[:, :-1].reshape(softmax.shard.ranks * blocks, fields, tokens)), every[:, -1].sum(0)


def finish(
    statistics: Tensor, label_logits: Tensor, labels: Tensor, softmax: Softmax, *, correct: bool = False
) -> TokenStatistics:
    """What the tokens are asked for, from statistics [1, fields, tokens] of the whole vocabulary.

    Args:
        statistics: from `over_ranks`.
        label_logits: from `over_ranks`.
        labels: [tokens], indices into the whole vocabulary.
        softmax: for its vocabulary and `ignore_index`.
        correct: also compare the label's logit with the largest of the others.
    """
    if statistics.is_cuda:
        from megatron_fp32.ops.logprobs.kernels import finish_triton

        with torch.cuda.device(statistics.device):
            fields = finish_triton(statistics, label_logits, labels, softmax)
    else:
        fields = finish_torch(statistics, label_logits, labels, softmax)
    done = TokenStatistics(*fields, *([] if len(fields) == 6 else [None]))
    if not correct:
        return done
    # The largest of the others skips a NaN; the log-prob does not.
    largest = (label_logits >= statistics[0, 0]) & ~done.logprob.isnan()
    return done._replace(correct=softmax.knows(labels) & largest)


def finish_torch(statistics: Tensor, label_logits: Tensor, labels: Tensor, softmax: Softmax) -> tuple[Tensor, ...]:
    """The definition of `finish`: five fields, or six with a mean."""
    rival, others, weighted = statistics[0, :3]
    ignored = labels == softmax.ignore_index
    known = softmax.knows(labels)
    label = torch.where(known, label_logits, -torch.inf)
    # From the largest of the others to the largest of all.
    top = rival.maximum(label)
    below = rival - top
    factor = below.exp()
    weighted = torch.where(factor == 0, 0.0, (weighted + others * below) * factor)
    others = others * factor
    distance = label - top
    own = distance.exp()
    log_sum = torch.where(distance == 0, others.log1p(), (others + own).log())
    total = others + own
    logprob = torch.where(known, distance - log_sum, torch.nan)
    rest = torch.where(known, others / total, torch.nan)
    entropy = log_sum - (weighted + torch.where(own == 0, 0.0, own * distance)) / total
    fields = [top, log_sum, logprob, rest, entropy]
    if statistics.shape[1] == FIELDS["logit"]:
        fields.append(statistics[0, 3] / softmax.shard.vocab_size)
    if statistics.shape[1] == FIELDS["logprob"]:
        distances, count = statistics[0, 3:]
        distances = distances + torch.where(count == 0, 0.0, count * below)
        fields.append((distances + torch.where(known, distance, 0.0)) / softmax.shard.vocab_size - log_sum)
    return tuple(torch.where(ignored, 0.0, field) for field in fields)
