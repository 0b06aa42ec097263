"""Which rank holds which rows of the vocabulary.

A row of the weight is a column of the logits. A rank's first row is its rank times its own number of rows. Where ranks
have different numbers of rows, as after `Tensor.chunk` or `DTensor.to_local`, log-probs would be of other tokens, and
ranks would not agree on the sizes of what they exchange: `check_even_shards` refuses that.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.products.ranks import gather_first_dim
from megatron_fp32.ops.traced import is_traced
from megatron_fp32.validation import check_count, check_flag

BLOCK = 128
"""Columns of the logits whose statistics are taken together. Only 128 divides every shard of every vocabulary under
Megatron's padding."""

_KNOWN = "_megatron_fp32_even_over"
"""The attribute of a weight whose number of rows was compared: the name of the group, and the number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VocabParallel:
    """How the vocabulary is spread over ranks, and how much of it is padding.

    Raises:
        TypeError: on construction, for a group that is not a ProcessGroup, a flag that is not a bool, or a size that is
            not an int.
        ValueError: on construction, for a `vocab_size` below 1.
    """

    group: dist.ProcessGroup | None = None
    """The tensor-parallel ranks, which hold equally many rows of the weight, in the order of their ranks. None for one
    process."""

    sequence_parallel: bool = False
    """Gather `hidden` over `group` before the product, and scatter its gradient after."""

    reduce_hidden_grad: bool = True
    """Sum the gradient of `hidden` over `group`. Does not apply with `sequence_parallel`, which always sums. Megatron
    calls it `allreduce_dgrad`."""

    vocab_size: int | None = None
    """Tokens of the vocabulary. Rows of the weight from here on are padding, on whatever rank they lie. None when there
    is no padding."""

    def __post_init__(self) -> None:
        if self.group is not None and not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {self.group!r}")
        check_flag("sequence_parallel", self.sequence_parallel)
        check_flag("reduce_hidden_grad", self.reduce_hidden_grad)
        if self.vocab_size is not None:
            check_count("vocab_size", self.vocab_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """This rank's rows of the weight, which are columns of the logits."""

    group: dist.ProcessGroup | None
    """Ranks that hold the other shards; None for one."""
    first_column: int
    """Index of this shard's first column in the whole vocabulary."""
    valid_columns: int
    """How many columns of this shard are not padding."""
    vocab_size: int
    """How many columns of all shards are not padding."""

    @property
    def ranks(self) -> int:
        """How many shards there are."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    def local_labels(self, labels: Tensor) -> Tensor:
        """[tokens] int32: the column of each label, or -1 where it is not among the valid ones of this shard."""
        local = labels - self.first_column
        return torch.where((local >= 0) & (local < self.valid_columns), local, -1).int()


def shard_of(weight: Tensor, vocab_parallel: VocabParallel) -> Shard:
    """This rank's shard. Every rank takes part in every call.

    Args:
        weight: this rank's rows, [vocab / tp, hidden].
        vocab_parallel: how the rows are spread over ranks.

    Raises:
        ValueError: on every rank, where ranks have different numbers of rows, or fewer than `vocab_size` in all.
    """
    group = _ranks_of(vocab_parallel)
    if group is not None and not is_traced(weight):
        # A compiler cannot wait for an answer. It relies on the calls before, or after.
        check_even_shards(weight, group)
    return _shard(weight.shape[0], group, vocab_parallel.vocab_size, "the rows of the weight")


def shard_of_columns(columns: int, vocab_parallel: VocabParallel) -> Shard:
    """This rank's shard of logits that are stored. Nothing is compared: see `columns_are_even`.

    Args:
        columns: of this rank's logits.
        vocab_parallel: how the columns are spread over ranks.

    Raises:
        ValueError: where all ranks have fewer columns than `vocab_size`.
    """
    return _shard(columns, _ranks_of(vocab_parallel), vocab_parallel.vocab_size, "the columns of the logits")


def _ranks_of(vocab_parallel: VocabParallel) -> dist.ProcessGroup | None:
    group = vocab_parallel.group
    return None if group is not None and dist.get_world_size(group) == 1 else group


def _shard(columns: int, group: dist.ProcessGroup | None, vocab_size: int | None, what: str) -> Shard:
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    total = columns * ranks if vocab_size is None else vocab_size
    if total > columns * ranks:
        raise ValueError(f"vocab_size must be 1 to {columns * ranks}, {what}, got {total}")
    return Shard(
        group=group,
        first_column=rank * columns,
        valid_columns=min(max(total - rank * columns, 0), columns),
        vocab_size=total,
    )


def columns_are_even(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[] bool on the logits' device: whether all ranks have equally many columns. Every rank takes part in every call.

    Logits are new in every step, so there is nowhere to remember an answer as `check_even_shards` does on a weight. On
    CUDA the caller uses the answer on the device, and the host does not wait.

    Args:
        logits: [..., vocab / tp], this rank's columns.
        group: the tensor-parallel ranks.

    Raises:
        ValueError: on every rank, where the numbers differ and the logits are on the CPU.
    """
    columns = logits.shape[-1]
    every = gather_first_dim(torch.full((1,), columns, dtype=torch.int64, device=logits.device), group)
    if not logits.is_cuda and (numbers := every.tolist()) != [columns] * len(numbers):
        raise ValueError(
            f"expected logits with equally many columns on every rank of vocab_parallel.group, got {numbers} columns: "
            "pad the vocabulary to a multiple of the number of ranks, and pass its real size as "
            "vocab_parallel.vocab_size"
        )
    return (every == columns).all()


@torch.compiler.disable
def check_even_shards(weight: Tensor, group: dist.ProcessGroup | None) -> None:
    """Compare the numbers of rows of all ranks' weights. Every rank takes part in every call.

    On CUDA the host waits for the device, once for each weight and group: the answer is remembered on the weight. While
    a CUDA graph is captured it cannot wait, and relies on the calls before.

    Args:
        weight: this rank's rows.
        group: the tensor-parallel ranks; None for one.

    Raises:
        ValueError: on every rank, where the numbers differ.
    """
    if group is None:
        return
    rows = weight.shape[0]
    every = gather_first_dim(torch.full((1,), rows, dtype=torch.int64, device=weight.device), group)
    known = (group.group_name, rows)
    if getattr(weight, _KNOWN, None) == known or _is_capturing(weight):
        return
    numbers = every.tolist()
    if any(number != rows for number in numbers):
        raise ValueError(
            f"expected a weight with equally many rows on every rank of vocab_parallel.group, got {numbers} rows: pad "
            "the vocabulary to a multiple of the number of ranks, and pass its real size as vocab_parallel.vocab_size"
        )
    setattr(weight, _KNOWN, known)


def _is_capturing(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):
        return torch.cuda.is_current_stream_capturing()
