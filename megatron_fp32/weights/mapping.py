"""Mappings: which rows of which Hugging Face tensors are which rows of which Megatron tensors.

A `TensorMapping` connects one or more Hugging Face tensors with one or more Megatron tensors. It is data: runs of rows,
and a rule for the values. Both directions of the conversion, and the rows that a shard holds, are computed from the
runs. Family files make mappings with the functions of this module (`rename`, `concat_rows`, ...). Names are full
checkpoint keys, and shapes are global (not per rank).

If a checkpoint stacks many tensors into one (experts, or layers that are all alike), each element of the stack has a
mapping of its own, so that a converter has one expert in memory instead of all experts of a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from megatron_fp32.weights.spec import Shape, TensorSpec

ValueRule = Literal["same", "transposed", "minus_one"]
"""What Megatron stores for a Hugging Face tensor w: w, its transpose, or w - 1 in fp32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowRun:
    """Consecutive rows of a Hugging Face tensor that are consecutive rows of a Megatron tensor.

    Rows are the first axis of the Megatron tensor. A transposed Hugging Face tensor is transposed before it is cut.
    """

    hf: int
    """Index into `TensorMapping.hf`."""
    hf_start: int
    megatron: int
    """Index into `TensorMapping.megatron`."""
    megatron_start: int
    rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorMapping:
    """Hugging Face tensors and Megatron tensors that hold the same rows.

    Raises:
        ValueError: when the runs do not cover every row of every tensor on both sides.
    """

    hf: tuple[TensorSpec, ...]
    megatron: tuple[TensorSpec, ...]
    runs: tuple[RowRun, ...]
    """Two runs with the same Megatron rows say that two Hugging Face tensors are copies, such as tied weights."""
    rule: ValueRule = "same"

    def __post_init__(self) -> None:
        if self.rule not in get_args(ValueRule):
            raise ValueError(f"rule must be one of {get_args(ValueRule)}, got {self.rule!r}")
        if not all(0 <= run.hf < len(self.hf) and 0 <= run.megatron < len(self.megatron) for run in self.runs):
            raise ValueError(f"a run of {self.hf[0]} names a tensor that the mapping does not have")
        axis = -1 if self.rule == "transposed" else 0
        for at, spec in enumerate(self.hf):
            _check_filled(spec, spec.shape[axis], [(r.hf_start, r.rows) for r in self.runs if r.hf == at])
        for at, spec in enumerate(self.megatron):
            _check_filled(spec, spec.shape[0], {(r.megatron_start, r.rows) for r in self.runs if r.megatron == at})

    @property
    def invertible(self) -> bool:
        """Whether `to_hf(to_megatron(x))` equals x bit for bit, for every x.

        `minus_one` is not invertible: fl(fl(w - 1) + 1) differs from w for most fp32 values below 0.5. A converter
        therefore keeps the original in the sidecar.
        """
        return self.rule != "minus_one"

    def place(
        self,
        *,
        hf: Callable[[TensorSpec], TensorSpec] | None = None,
        megatron: Callable[[TensorSpec], TensorSpec] | None = None,
    ) -> TensorMapping:
        """A copy of the mapping whose tensors lie somewhere else, such as in a stack."""
        return dataclasses.replace(
            self,
            hf=tuple(map(hf, self.hf)) if hf else self.hf,
            megatron=tuple(map(megatron, self.megatron)) if megatron else self.megatron,
        )

    def to_megatron(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Convert the tensors of `hf` to the tensors of `megatron`, in that order.

        A result that is one run of rows is a view of the input, or the input itself.

        Raises:
            ValueError: when Hugging Face tensors that must be copies of each other have different bits.
        """
        if self.rule == "minus_one":
            tensors = [tensor.float() - 1 for tensor in tensors]
        elif self.rule == "transposed":
            tensors = [tensor.t() for tensor in tensors]
        found = []
        for at in range(len(self.megatron)):
            pieces: dict[tuple[int, int], Tensor] = {}
            for run in self.runs:
                if run.megatron == at:
                    place, rows = (run.megatron_start, run.rows), _rows(tensors[run.hf], run.hf_start, run.rows)
                    if not _same_bits(pieces.setdefault(place, rows), rows):
                        raise ValueError(self._different_copies(at, run))
            found.append(_joined(pieces))
        return tuple(tensor.contiguous() for tensor in found) if self.rule == "transposed" else tuple(found)

    def to_hf(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Convert the tensors of `megatron` to the tensors of `hf`, in that order; views as in `to_megatron`."""
        found = [
            _joined(
                {
                    (run.hf_start, run.rows): _rows(tensors[run.megatron], run.megatron_start, run.rows)
                    for run in self.runs
                    if run.hf == at
                }
            )
            for at in range(len(self.hf))
        ]
        if self.rule == "minus_one":
            return tuple(tensor.float() + 1 for tensor in found)
        return tuple(tensor.t().contiguous() for tensor in found) if self.rule == "transposed" else tuple(found)

    def runs_in_shard(self, megatron: int, start: int, stop: int) -> tuple[RowRun, ...]:
        """The runs in rows `start` to `stop` of a Megatron tensor, for example the rows of a tensor-parallel rank.

        Args:
            megatron: index into `TensorMapping.megatron`.
            start, stop: rows of the whole tensor.

        Returns:
            Runs whose `megatron_start` counts from the first row of the shard.
        """
        found = []
        for run in self.runs:
            first, last = max(run.megatron_start, start), min(run.megatron_start + run.rows, stop)
            if run.megatron == megatron and first < last:
                hf_start = run.hf_start + first - run.megatron_start
                cut = dataclasses.replace(run, hf_start=hf_start, megatron_start=first - start, rows=last - first)
                found.append(cut)
        return tuple(found)

    def _different_copies(self, megatron: int, run: RowRun) -> str:
        first = next(r for r in self.runs if (r.megatron, r.megatron_start) == (megatron, run.megatron_start))
        return (
            f"{self.hf[run.hf].name} and {self.hf[first.hf].name} have different values, but config.json says that "
            "they are tied; set tie_word_embeddings to false in config.json to convert both"
        )


def _check_filled(spec: TensorSpec, rows: int, runs: Iterable[tuple[int, int]]) -> None:
    end = 0
    for start, count in sorted(runs):
        if start != end or count < 0:
            raise ValueError(f"{spec}: a run of {count} rows starts at row {start}, expected row {end}")
        end += count
    if end != rows:
        raise ValueError(f"{spec}: the runs have {end} rows, expected {rows}")


def _rows(tensor: Tensor, start: int, rows: int) -> Tensor:
    return tensor if rows == tensor.shape[0] else tensor.narrow(0, start, rows)


def _joined(pieces: dict[tuple[int, int], Tensor]) -> Tensor:
    """The pieces, given by (first row, rows), one after another. A single piece is not copied."""
    ordered = [pieces[place] for place in sorted(pieces)]
    return ordered[0] if len(ordered) == 1 else torch.cat(ordered)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a is b or torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# Functions for the family files


def rename(hf: str, megatron: str, shape: Shape) -> TensorMapping:
    """One tensor on each side, with equal values."""
    return _one_to_one(hf, megatron, shape, shape, "same")


def transposed(hf: str, megatron: str, shape: tuple[int, int]) -> TensorMapping:
    """A matrix that Hugging Face stores transposed; `shape` is the Megatron tensor's."""
    return _one_to_one(hf, megatron, shape[::-1], shape, "transposed")


def zero_centred(hf: str, megatron: str, shape: Shape) -> TensorMapping:
    """A norm weight w that Megatron stores as w - 1, in fp32. `to_hf` returns w in fp32."""
    return _one_to_one(hf, megatron, shape, shape, "minus_one")


def _one_to_one(hf: str, megatron: str, hf_shape: Shape, shape: Shape, rule: ValueRule) -> TensorMapping:
    return TensorMapping(
        hf=(TensorSpec(name=hf, shape=hf_shape),),
        megatron=(TensorSpec(name=megatron, shape=shape),),
        runs=(RowRun(hf=0, hf_start=0, megatron=0, megatron_start=0, rows=shape[0]),),
        rule=rule,
    )


def shared(hf: Sequence[str], megatron: str, shape: Shape) -> TensorMapping:
    """Several equal Hugging Face tensors that are one Megatron tensor, such as a tied embedding and head.

    Args:
        hf: names of the Hugging Face tensors.
        megatron: name of the Megatron tensor.
        shape: shape of each tensor.
    """
    return TensorMapping(
        hf=tuple(TensorSpec(name=name, shape=shape) for name in hf),
        megatron=(TensorSpec(name=megatron, shape=shape),),
        runs=tuple(RowRun(hf=at, hf_start=0, megatron=0, megatron_start=0, rows=shape[0]) for at in range(len(hf))),
    )


def split_rows(hf: str, parts: Sequence[tuple[str, int]], row_shape: Shape, *, groups: int = 1) -> TensorMapping:
    """One Hugging Face tensor whose row blocks are separate Megatron tensors.

    With `groups` the blocks recur, as in `in_proj_qkvz` of Qwen3-Next: the Hugging Face tensor is [block 0 of group 0 |
    block 1 of group 0 | ... | block 0 of group 1 | ...]. Megatron tensor n holds block n of every group.

    Args:
        hf: name of the Hugging Face tensor.
        parts: names of the Megatron tensors and their rows, all groups together.
        row_shape: shape of one row.
        groups: how often the blocks recur.
    """
    rows = [count for _, count in parts]
    return TensorMapping(
        hf=(TensorSpec(name=hf, shape=(sum(rows), *row_shape)),),
        megatron=tuple(TensorSpec(name=name, shape=(count, *row_shape)) for name, count in parts),
        runs=tuple(
            RowRun(hf=0, hf_start=joined, megatron=part, megatron_start=own, rows=count)
            for part, own, joined, count in _interleaved(rows, groups)
        ),
    )


def concat_rows(parts: Sequence[tuple[str, int]], megatron: str, row_shape: Shape, *, groups: int = 1) -> TensorMapping:
    """Hugging Face tensors that are row blocks of one Megatron tensor, such as gate and up in `linear_fc1`.

    With `groups` the blocks recur, as in `linear_qkv`: for each query group [q of its heads | k | v]
    (megatron/core/transformer/attention.py).

    Args:
        parts: names of the Hugging Face tensors and their rows, all groups together.
        megatron: name of the Megatron tensor.
        row_shape: shape of one row.
        groups: how often the blocks recur.
    """
    rows = [count for _, count in parts]
    return TensorMapping(
        hf=tuple(TensorSpec(name=name, shape=(count, *row_shape)) for name, count in parts),
        megatron=(TensorSpec(name=megatron, shape=(sum(rows), *row_shape)),),
        runs=tuple(
            RowRun(hf=part, hf_start=own, megatron=0, megatron_start=joined, rows=count)
            for part, own, joined, count in _interleaved(rows, groups)
        ),
    )


def _interleaved(rows: Sequence[int], groups: int) -> Iterator[tuple[int, int, int, int]]:
    """(part, start in the part, start in the joined tensor, rows) of every block, group by group."""
    blocks = [count // groups for count in rows]
    joined = 0
    for group in range(groups):
        for part, block in enumerate(blocks):
            yield part, group * block, joined, block
            joined += block


def gated_qkv(
    q: str, k: str, v: str, megatron: str, *, heads: int, groups: int, head_dim: int, hidden: int
) -> TensorMapping:
    """Attention with an output gate.

    Hugging Face's `q_proj` has, for each head, q and then its gate. megatron-core's `linear_qkv` has, for each query
    group, [q of its heads | gate of its heads | k | v] (megatron/core/transformer/attention.py).
    """
    of_group = heads // groups
    order = []
    for group in range(groups):
        members = range(group * of_group, (group + 1) * of_group)
        order += [(0, 2 * head + gate) for gate in (0, 1) for head in members]
        order += [(1, group), (2, group)]
    return TensorMapping(
        hf=(
            TensorSpec(name=q, shape=(2 * heads * head_dim, hidden)),
            TensorSpec(name=k, shape=(groups * head_dim, hidden)),
            TensorSpec(name=v, shape=(groups * head_dim, hidden)),
        ),
        megatron=(TensorSpec(name=megatron, shape=(2 * (heads + groups) * head_dim, hidden)),),
        runs=tuple(
            RowRun(hf=hf, hf_start=block * head_dim, megatron=0, megatron_start=at * head_dim, rows=head_dim)
            for at, (hf, block) in enumerate(order)
        ),
    )
