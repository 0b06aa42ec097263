"""dX in an order of summation that neither the batch nor the sharding of the vocabulary changes.

dX contracts over the vocabulary, of which every rank has a part. The vocabulary is cut into groups of columns, counted
from its beginning, whatever the ranks. Within a group the terms are added one step of the product after another. Where
a group lies on several ranks, each rank continues the sums of the rank before it. The sums of the groups are added as
integers, in units of 2^-61 of a bound that all ranks know. A sum of integers does not depend on the order, so neither
does their reduction over the ranks. A unit is 2^37 times finer than the last bit of an fp32 number as large as the
bound.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.products.chunks import CHUNK, UNSPLIT_CHUNK, even_chunks
from megatron_fp32.ops.products.fixed_order import COLUMNS, ROWS
from megatron_fp32.ops.products.gemm import mm_fp32
from megatron_fp32.ops.products.hidden_grad import HiddenGrad
from megatron_fp32.ops.products.shard import Shard
from megatron_fp32.ops.products.split import Pieces

_BITS = 61
_TOKENS_AT_A_TIME = 1024
"""Rows that become integers at a time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Segment:
    """What one rank has of one group: columns of its weight, and whether the group begins and ends there."""

    columns: slice
    begins: bool
    ends: bool


def segments(shard: Shard, size: int) -> list[_Segment]:
    """What this rank has of each group of `size` columns, in the order in which they are to be worked on.

    First what the next rank waits for, last what waits for the rank before.
    """
    found = []
    start, end = shard.first_column, shard.first_column + shard.valid_columns
    while start < end:
        stop = min(end, (start // size + 1) * size)
        columns = slice(start - shard.first_column, stop - shard.first_column)
        found.append(
            _Segment(columns=columns, begins=start % size == 0, ends=stop % size == 0 or stop == shard.vocab_size)
        )
        start = stop
    return sorted(found, key=lambda s: (not s.begins, s.ends))


class InvariantHiddenGrad(HiddenGrad):
    """dX on its way, as integers.

    Args:
        tokens: how many.
        weight: [columns, hidden], this rank's rows.
        shard: which rows they are, and the tensor-parallel ranks.
        pieces: how many stand for dY.
        scatter: every rank receives the sum of its own tokens.
    """

    def __init__(self, tokens: int, weight: Tensor, *, shard: Shard, pieces: int, scatter: bool) -> None:
        group = shard.group
        total = torch.zeros(tokens, weight.shape[1], dtype=torch.int64, device=weight.device)
        super().__init__(total, group=group, scatter=scatter, reduce=not scatter and group is not None)
        self._shard = shard
        self._size = CHUNK if pieces > 1 else UNSPLIT_CHUNK
        self._units = torch.full((tokens,), torch.nan, dtype=torch.float64, device=weight.device)
        self._largest = _largest(weight[: shard.valid_columns], group)

    def of(self, tokens: slice, bounds: Callable[[], Tensor] | None = None) -> InvariantSum:
        """As the base class, with bounds that are the same on every rank."""
        assert bounds is not None
        self._units[tokens] = _units(bounds(), self._largest)
        return InvariantSum(self.partial[tokens], self._units[tokens], self._shard, size=self._size)

    def finish(self) -> Tensor:
        """The sum, [tokens, hidden] float32, or [tokens / tp, hidden] after a scatter."""
        total = super().finish()
        units = self._units
        if self._scatter:
            units = units[dist.get_rank(self._group) * len(total) :][: len(total)]
        result = torch.empty(total.shape, dtype=torch.float32, device=total.device)
        for rows in _row_chunks(len(total)):
            result[rows] = total[rows].double() / units[rows, None]
        return result


class InvariantSum:
    """dX of a block of tokens, as `accumulate_gradients` fills it: a `HiddenSum`."""

    def __init__(self, total: Tensor, units: Tensor, shard: Shard, *, size: int) -> None:
        self._total, self._units = total, units
        self._group, self._valid = shard.group, shard.valid_columns
        self._segments = segments(shard, size)
        self._chain = torch.empty(total.shape, dtype=torch.float32, device=total.device)
        self._sent: list[tuple[dist.Work, Tensor]] = []
        self._received: tuple[dist.Work, Tensor] | None = None

    def chunks(self, columns: int, largest: int) -> list[slice]:
        """Every column of this rank once, in the order in which `add` wants them; padding last."""
        chunks = [
            slice(s.columns.start + c.start, s.columns.start + c.stop)
            for s in self._segments
            for c in even_chunks(s.columns.stop - s.columns.start, largest)
        ]
        if self._valid < columns or not chunks:
            padding = even_chunks(columns - self._valid, largest) or [slice(0, 0)]
            chunks += [slice(self._valid + c.start, self._valid + c.stop) for c in padding]
        if any(not s.begins for s in self._segments):
            self._receive()
        return chunks

    def add(self, columns: slice, grad: Pieces, weight: Tensor) -> None:
        """Add the terms of some columns, [tokens, columns] in pieces, with these rows of the weight."""
        segment = next((s for s in self._segments if s.columns.start <= columns.start < s.columns.stop), None)
        if segment is None or len(self._total) == 0:
            return
        opens = columns.start == segment.columns.start
        if opens and not segment.begins:
            assert self._received is not None
            work, self._chain = self._received
            work.wait()
        begin = opens and segment.begins
        if self._chain.is_cuda:
            from megatron_fp32.ops.products.hidden_grad_triton import add_hidden_grad

            with torch.cuda.device(self._chain.device):
                add_hidden_grad(self._chain, grad.parts, weight, begin=begin)
        else:
            _add_on_cpu(self._chain, grad.parts, weight, begin=begin)
        if columns.stop == segment.columns.stop:
            self._close(segment, grad.inverse_scale)

    def finish(self, inverse_scale: Tensor | None) -> None:
        """Wait for what was sent."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def _close(self, segment: _Segment, inverse_scale: Tensor | None) -> None:
        if not segment.ends:
            self._send()
            return
        units = self._units if inverse_scale is None else self._units * inverse_scale
        for rows in _row_chunks(len(self._total)):
            self._total[rows] += (self._chain[rows].double() * units[rows, None]).long()

    def _send(self) -> None:
        assert self._group is not None
        to = dist.get_global_rank(self._group, dist.get_rank(self._group) + 1)
        self._sent.append((_posted(dist.isend(self._chain, to, group=self._group)), self._chain))
        self._chain = torch.empty_like(self._chain)

    def _receive(self) -> None:
        assert self._group is not None
        if len(self._total) == 0:
            return
        room = torch.empty_like(self._chain)
        origin = dist.get_global_rank(self._group, dist.get_rank(self._group) - 1)
        self._received = _posted(dist.irecv(room, origin, group=self._group)), room


def _posted(work: dist.Work | None) -> dist.Work:
    assert work is not None
    return work


def _add_on_cpu(chain: Tensor, grads: tuple[Tensor, ...], weight: Tensor, *, begin: bool) -> None:
    """Products of one fixed shape, as in `fixed_order_product`; small terms first."""
    tokens, hidden_size = chain.shape
    dy = chain.new_empty(ROWS, COLUMNS)
    block = chain.new_empty(COLUMNS, hidden_size)
    product = chain.new_empty(ROWS, hidden_size)
    if begin:
        chain.zero_()
    for column in range(0, weight.shape[0], COLUMNS):
        columns = slice(column, min(column + COLUMNS, weight.shape[0]))
        block.zero_()[: columns.stop - column] = weight[columns]
        for row in range(0, tokens, ROWS):
            rows = slice(row, min(row + ROWS, tokens))
            for grad in reversed(grads):
                dy.zero_()[: rows.stop - row, : columns.stop - column] = grad[rows, columns]
                chain[rows] += mm_fp32(dy, block, out=product)[: rows.stop - row]


def _largest(weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest |element| of all ranks' weights, [] float32; NaN where there is one."""
    largest = torch.zeros((), dtype=torch.float32, device=weight.device)
    if weight.numel() > 0:
        low, high = torch.aminmax(weight)
        largest = torch.maximum(-low, high).float()
    if group is not None:
        # Not every reduction keeps a NaN.
        largest = torch.where(largest.isnan(), torch.inf, largest)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


def _units(bounds: Tensor, largest: Tensor) -> Tensor:
    """Units in 1, [tokens] float64, powers of two; NaN where no finite sum is to be expected."""
    bound = bounds.double() * largest
    _, exponent = torch.frexp(bound)
    # By their bits: powers that torch computes may be rounded.
    units = (((_BITS - exponent).long().clamp(max=1000) + 1023) << 52).view(torch.float64)
    return torch.where(bound < torch.finfo(torch.float32).max, units, torch.nan)


def _row_chunks(length: int) -> Iterator[slice]:
    return (slice(start, start + _TOKENS_AT_A_TIME) for start in range(0, length, _TOKENS_AT_A_TIME))
