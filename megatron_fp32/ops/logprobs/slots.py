"""Several chosen tokens of the vocabulary for every position: their softmax, and their elements of dY.

A position has K slots, each with a token. The statistics of the softmax leave out all chosen tokens, as those of one
label leave out the label: what remains is the rest. With e the exponentials of the chosen logits and R the sum of the
rest, log p of the largest chosen token is the log1p of what the others are to it, and the probability of the rest is a
sum, not a difference to 1. Everything here is [tokens, K] or [tokens], in float64: K is small beside the vocabulary.

With p the softmax, H its entropy, and upstream gradients g[k] of log p[token k], l[k] of its logit, r of the rest's
log-prob, h of H and s of the logsumexp; G the sum of g; and R the rest's probability:

    chosen token v:     dz[v] = l[v] + g[v] (1 - p[v]) - p[v] (G - g[v] + r - s + h (log p[v] + H))
    any other token v:  dz[v] = -q[v] ((G - s) R - r (1 - R) + h R (log q[v] + log R + H)),   q = p / R

where l[v] and g[v] are sums over the slots that hold v. q is the softmax of the rest alone: it keeps its digits where R
is so small that p would be 0.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logprobs.softmax import LogitsTransform, Softmax
from megatron_fp32.ops.logprobs.statistics import over_ranks, stored_statistics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
    """The chosen tokens of some positions, all [tokens, K]."""

    tokens: Tensor
    """Indices into the whole vocabulary."""
    known: Tensor
    """bool: whether the slot holds a token of the vocabulary."""
    ignored: Tensor
    """bool: whether the slot is empty."""
    first: Tensor
    """bool: whether the slot is known, and no earlier one holds its token."""
    order: Tensor
    """Places of the slots, sorted by token."""

    @staticmethod
    def of(tokens: Tensor, softmax: Softmax) -> Slots:
        """Of tokens [tokens, K]."""
        known, ignored = softmax.knows(tokens), tokens == softmax.ignore_index
        ordered, order = torch.where(known, tokens, -1).sort(dim=1, stable=True)
        begins = torch.ones_like(known)
        begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        first = torch.empty_like(known).scatter_(1, order, begins & (ordered >= 0))
        return Slots(tokens=tokens, known=known, ignored=ignored, first=first, order=order)

    @property
    def position_ignored(self) -> Tensor:
        """[tokens] bool: whether all slots are empty."""
        return self.ignored.all(1)

    def local(self, softmax: Softmax) -> Tensor:
        """Columns of this rank's shard; -1 for a token that is not among them."""
        return torch.where(self.known, softmax.shard.local_labels(self.tokens), -1).long()

    def sums_by_token(self, values: Tensor) -> Tensor:
        """Of every slot, the sum of `values` [tokens, K] over all slots of the position that hold the same token."""
        token = torch.where(self.known, self.tokens, -1).gather(1, self.order)
        ordered = values.gather(1, self.order)
        # A token's own value is in both scans. The scans take log2(K) steps and have a fixed order.
        both = _scan(ordered, token) + _scan(ordered.flip(1), token.flip(1)).flip(1) - ordered
        return torch.empty_like(values).scatter_(1, self.order, both)


def _scan(values: Tensor, keys: Tensor) -> Tensor:
    """Running sums along dimension 1 over neighbours with equal keys, which are sorted."""
    step = 1
    while step < values.shape[1]:
        same = keys[:, step:] == keys[:, :-step]
        added = values[:, step:] + torch.where(same, values[:, :-step], 0.0)
        values = torch.cat([values[:, :step], added], 1)
        step *= 2
    return values


def sum_of_slots(values: Tensor) -> Tensor:
    """[tokens] of [tokens, K], in an order that torch does not choose."""
    while values.shape[1] > 1:
        half = -(-values.shape[1] // 2)
        upper = values[:, half:]
        values = torch.cat([values[:, : upper.shape[1]] + upper, values[:, upper.shape[1] : half]], 1)
    return values[:, 0]


class SlotStatistics(NamedTuple):
    """Of some positions, over the whole vocabulary."""

    logits: Tensor
    """[tokens, K] float32 of the chosen tokens; 0 where a slot is not known."""
    products: Tensor | None
    """[tokens, K] float32: the products that became these logits; None without a soft cap, which alone needs them."""
    rest: Tensor
    """[3, tokens] float32: the largest logit of all tokens that are not chosen, and their sums of e and of e times its
    distance, as in `statistics.py`."""


def slot_statistics(raw: Tensor, slots: Slots, inverse_temperature: Tensor, softmax: Softmax) -> SlotStatistics:
    """Statistics of positions whose products are there.

    Args:
        raw: [tokens, columns] float32, the products of this shard; not changed.
        slots: of the tokens.
        inverse_temperature: [tokens] float32.
        softmax: over the vocabulary, with this rank's columns.
    """
    tokens, columns = raw.shape
    local = slots.local(softmax)
    here = local >= 0
    products = torch.where(here, raw.gather(1, local.clamp(min=0)), 0.0)
    # One column more takes what belongs to other shards.
    room = torch.empty(tokens, -(-(columns + 1) // 8) * 8, dtype=torch.float32, device=raw.device)
    z = room[:, :columns].copy_(softmax.finished_logits(raw, inverse_temperature))
    logits = torch.where(here, z.gather(1, local.clamp(min=0)), 0.0)
    room.scatter_(1, torch.where(here, local, columns), -torch.inf)
    no_label = torch.full((tokens,), -1, dtype=torch.int32, device=z.device)
    one = torch.ones_like(inverse_temperature)
    statistics, nothing = stored_statistics(z, no_label, one, softmax.of_finished_logits, mean="none")
    statistics, _ = over_ranks(statistics, nothing, softmax)
    if softmax.shard.group is not None:
        # One rank has each token, the others zeros: no order of summation changes a bit.
        both = torch.stack([logits, products])
        dist.all_reduce(both, group=softmax.shard.group)
        logits, products = both
    return SlotStatistics(logits, products if softmax.transform.softcap is not None else None, statistics[0])


class SlotSoftmax(NamedTuple):
    """The softmax of some positions, in float64."""

    logprobs: Tensor
    """[tokens, K]; NaN for a slot that is neither known nor ignored."""
    others: Tensor
    """[tokens, K]: 1 - p."""
    rest: Tensor
    """[tokens]: the probability of all tokens that are not chosen."""
    log_rest: Tensor
    """[tokens]: its log."""
    chosen: Tensor
    """[tokens]: 1 - rest."""
    entropy: Tensor
    """[tokens], in nats."""
    logsumexp: Tensor
    """[tokens]"""


def slot_softmax(statistics: SlotStatistics, slots: Slots) -> SlotSoftmax:
    """Put the chosen tokens and the rest together."""
    z = statistics.logits.double()
    rest_top, rest_sum, rest_weighted = statistics.rest.double()
    chosen_z = torch.where(slots.first, z, -torch.inf)
    largest, place = chosen_z.max(1)
    top = largest.maximum(rest_top)
    distance = chosen_z - top[:, None]
    e = distance.exp()
    below = rest_top - top
    factor = below.exp()
    rest = torch.where(factor == 0, 0.0, rest_sum * factor)
    is_largest = slots.sums_by_token(_one_at(place, e)) > 0
    others = rest + sum_of_slots(torch.where(_one_at(place, e) > 0, 0.0, e))
    e_largest = e.gather(1, place[:, None])[:, 0]
    total = others + e_largest
    log_sum = torch.where(largest == top, others.log1p(), total.log())
    logprobs = torch.where(slots.known, z - top[:, None] - log_sum[:, None], torch.nan)
    rest_of_slot = torch.where(is_largest, others[:, None], total[:, None] - (z - top[:, None]).exp())
    sum_chosen = sum_of_slots(e)
    log_rest = torch.where(rest > sum_chosen, -(sum_chosen / rest).log1p(), below + rest_sum.log() - log_sum)
    weighted = torch.where(factor == 0, 0.0, (rest_weighted + rest_sum * below) * factor)
    weighted = weighted + sum_of_slots(torch.where(e == 0, 0.0, e * distance))
    return SlotSoftmax(
        logprobs=logprobs,
        others=torch.where(slots.known, rest_of_slot / total[:, None], torch.nan),
        rest=rest / total,
        log_rest=log_rest,
        chosen=sum_chosen / total,
        entropy=log_sum - weighted / total,
        logsumexp=top + log_sum,
    )


def _one_at(place: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).scatter_(1, place[:, None], 1.0)


class SlotUpstream(NamedTuple):
    """Upstream gradients of the outputs; None for 0."""

    logprobs: Tensor | None
    """[tokens, K]"""
    logits: Tensor | None
    """[tokens, K]"""
    rest: Tensor | None
    """[tokens]"""
    entropy: Tensor | None
    """[tokens]"""
    logsumexp: Tensor | None
    """[tokens]"""


class SlotGradient(NamedTuple):
    """What dY depends on besides the products."""

    vectors: Tensor
    """[6 or 8, tokens] float32, as `gradient_vectors` returns, of the softmax of the rest. In place of a label's
    element: a bound on the sum of the absolute elements of dY, which also says whether a token is live."""
    elements: Tensor
    """[tokens, K] float32: dY of the chosen tokens, equal for slots that hold the same token."""


def slot_gradient(
    statistics: SlotStatistics, slots: Slots, inverse_temperature: Tensor, softmax: Softmax, upstream: SlotUpstream
) -> SlotGradient:
    """dY of the chosen tokens, and what the kernel needs for all others."""
    of = slot_softmax(statistics, slots)
    zero = torch.zeros_like(of.entropy)
    no_slot = torch.zeros_like(of.logprobs)
    g, of_logits = (
        no_slot if x is None else torch.where(slots.ignored, 0.0, x.double())
        for x in (upstream.logprobs, upstream.logits)
    )
    r, h, s = (zero if x is None else x.double() for x in (upstream.rest, upstream.entropy, upstream.logsumexp))
    live = ((g != 0) | (of_logits != 0)).any(1) | (r != 0) | (h != 0) | (s != 0)
    live = live & ~slots.position_ignored
    # NaN for a token outside of the vocabulary whose gradient is asked for: it has no element that could be.
    outside = ~slots.known & ((g != 0) | (of_logits != 0))
    wrong = torch.where(outside.any(1), torch.nan, 0.0) + (of.logsumexp - of.logsumexp)
    by_token, of_logits = slots.sums_by_token(g), slots.sums_by_token(of_logits)
    total = sum_of_slots(g)
    p = of.logprobs.exp()
    information = torch.where(p == 0, 0.0, p * (of.logprobs + of.entropy[:, None]))
    elements = of_logits + by_token * of.others - p * (total[:, None] - by_token + (r - s)[:, None])
    elements = elements - torch.where(h == 0, 0.0, h)[:, None] * information + wrong[:, None]
    elements = torch.where(slots.known & live[:, None], elements, 0.0)
    of_all = (total - s) * of.rest - torch.where(r == 0, 0.0, r * of.chosen) + wrong
    rest_top, rest_sum, _ = statistics.rest
    there = rest_sum != 0  # NaN is
    bound = sum_of_slots(elements.abs())
    entropy_vectors = []
    if upstream.entropy is not None:
        known = there & (of.rest != 0)
        of_entropy, shift = (torch.where(known, x, 0.0) for x in (h * of.rest, of.entropy + of.log_rest))
        entropy_vectors = [of_entropy.float(), shift.float()]
        bound = bound + (of_entropy * shift).abs()
    vectors = [
        torch.where(there, rest_top, 0.0),
        torch.where(there, rest_sum.log(), 0.0),
        inverse_temperature,
        of_all.float(),
        bound.float(),
        torch.zeros_like(rest_top),
        *entropy_vectors,
    ]
    slope = inverse_temperature[:, None].double() * softmax.transform.scale
    if statistics.products is not None:
        slope = slope * _cap_slope(statistics.products.double(), softmax.transform)
    return SlotGradient(
        vectors=torch.where(live, torch.stack(vectors), 0.0),
        elements=torch.where(elements == 0, 0.0, elements * slope).float(),
    )


def _cap_slope(products: Tensor, transform: LogitsTransform) -> Tensor:
    """1 - tanh^2, without the cancellation."""
    assert transform.softcap is not None
    e = torch.exp(-2 * (products * transform.scale / transform.softcap).abs())
    return 4 * e / (1 + e).square()
