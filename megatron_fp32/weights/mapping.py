"""How tensors of one layout become tensors of another: the vocabulary that family files are written in.

A `Mapping` joins one or more Hugging Face tensors to one or more Megatron tensors that hold the same values. Both
directions are pure functions of plain tensors, so that a converter can stream them, one mapping in memory at a time.
Names are full checkpoint keys; shapes are global (not per rank).

Where a checkpoint stacks many tensors into one (experts, and layers that are all alike), each element of the stack is a
tensor of its own here: what is in memory is then one expert, not all of a layer's.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor, or one element of a stack of tensors that a checkpoint holds under one name."""

    name: str
    shape: Shape
    """Of the tensor itself, without the axes of the stack."""
    index: Shape = ()
    """Which element it is: one number for each axis of the stack. Empty where nothing is stacked."""
    stack: Shape = ()
    """Sizes of the stack's axes, which come first in the checkpoint's tensor."""

    @property
    def stored_shape(self) -> Shape:
        """Shape of what the checkpoint holds under `name`."""
        return (*self.stack, *self.shape)

    def __str__(self) -> str:
        """The name, and which element: `experts.down_proj[3]`."""
        return f"{self.name}{list(self.index)}" if self.index else self.name

    def in_stack(self, index: int, size: int, name: str | None = None) -> TensorSpec:
        """As element `index` of a stack of `size`, outside of the stacks that it is in already."""
        return dataclasses.replace(self, name=name or self.name, index=(index, *self.index), stack=(size, *self.stack))


class Mapping(ABC):
    """The tensors of one mapping on both sides, and the functions between them."""

    hf: tuple[TensorSpec, ...]
    megatron: tuple[TensorSpec, ...]

    invertible: bool = True
    """`to_hf(to_megatron(x))` equals x bit for bit, for every x."""

    def place(
        self,
        *,
        hf: Callable[[TensorSpec], TensorSpec] | None = None,
        megatron: Callable[[TensorSpec], TensorSpec] | None = None,
    ) -> Mapping:
        """The same functions between tensors that lie somewhere else, such as in a stack."""
        moved = copy.copy(self)
        moved.hf = tuple(map(hf, self.hf)) if hf else self.hf
        moved.megatron = tuple(map(megatron, self.megatron)) if megatron else self.megatron
        return moved

    @abstractmethod
    def to_megatron(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The Megatron tensors, in the order of `megatron`, from those of `hf`."""

    @abstractmethod
    def to_hf(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The Hugging Face tensors, in the order of `hf`, from those of `megatron`."""


class Rename(Mapping):
    """One tensor on each side, the same values."""

    def __init__(self, hf: str, megatron: str, shape: Shape) -> None:
        self.hf = (TensorSpec(name=hf, shape=shape),)
        self.megatron = (TensorSpec(name=megatron, shape=shape),)

    def to_megatron(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Unchanged."""
        return (tensors[0],)

    def to_hf(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Unchanged."""
        return (tensors[0],)


class Shared(Mapping):
    """Several Hugging Face tensors that are one Megatron tensor, such as a tied embedding that is stored as head too.

    Args:
        hf: names.
        megatron: name.
        shape: of all of them.
    """

    def __init__(self, hf: Sequence[str], megatron: str, shape: Shape) -> None:
        self.hf = tuple(TensorSpec(name=name, shape=shape) for name in hf)
        self.megatron = (TensorSpec(name=megatron, shape=shape),)

    def to_megatron(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The first. Raises ValueError when another has other values."""
        first = tensors[0].contiguous().view(torch.uint8)
        for spec, tensor in zip(self.hf[1:], tensors[1:], strict=True):
            if not torch.equal(tensor.contiguous().view(torch.uint8), first):
                raise ValueError(
                    f"{spec.name} and {self.hf[0].name} have other values, and config.json ties them; set "
                    "tie_word_embeddings to false there to convert both"
                )
        return (tensors[0],)

    def to_hf(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The same tensor for every name."""
        return tuple(tensors[0] for _ in self.hf)


class Transposed(Mapping):
    """A matrix that Hugging Face stores transposed.

    Args:
        hf, megatron: names.
        shape: of the Megatron tensor.
    """

    def __init__(self, hf: str, megatron: str, shape: tuple[int, int]) -> None:
        self.hf = (TensorSpec(name=hf, shape=shape[::-1]),)
        self.megatron = (TensorSpec(name=megatron, shape=shape),)

    def to_megatron(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The transpose, contiguous."""
        return (tensors[0].t().contiguous(),)

    def to_hf(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The transpose, contiguous."""
        return (tensors[0].t().contiguous(),)


class SplitRows(Mapping):
    """One Hugging Face tensor whose row blocks are separate Megatron tensors.

    With `groups` the blocks recur: the Hugging Face tensor is [first of group 0 | second of group 0 | ... | first of
    group 1 | ...], as `in_proj_qkvz` of Qwen3-Next, and each Megatron tensor has the blocks of one kind one after
    another.

    Args:
        hf: name.
        parts: names of the Megatron tensors and their rows, all groups together.
        row_shape: what follows the rows.
        groups: see above.
    """

    def __init__(self, hf: str, parts: Sequence[tuple[str, int]], row_shape: Shape, *, groups: int = 1) -> None:
        self._groups, self._rows = groups, [rows for _, rows in parts]
        self.hf = (TensorSpec(name=hf, shape=(sum(self._rows), *row_shape)),)
        self.megatron = tuple(TensorSpec(name=name, shape=(rows, *row_shape)) for name, rows in parts)

    def to_megatron(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The row blocks."""
        return _split_rows(tensors[0], self._rows, self._groups)

    def to_hf(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The row blocks one after another, group by group."""
        return (_join_rows(tensors, self._groups),)


class ConcatRows(Mapping):
    """Hugging Face tensors that are row blocks of one Megatron tensor, such as gate and up of `linear_fc1`.

    With `groups` the blocks recur, as in `linear_qkv`: for each query group [q of its heads | k | v]
    (megatron/core/transformer/attention.py).

    Args:
        parts: names of the Hugging Face tensors and their rows, all groups together.
        megatron: name.
        row_shape: what follows the rows.
        groups: see above.
    """

    def __init__(self, parts: Sequence[tuple[str, int]], megatron: str, row_shape: Shape, *, groups: int = 1) -> None:
        self._groups, self._rows = groups, [rows for _, rows in parts]
        self.hf = tuple(TensorSpec(name=name, shape=(rows, *row_shape)) for name, rows in parts)
        self.megatron = (TensorSpec(name=megatron, shape=(sum(self._rows), *row_shape)),)

    def to_megatron(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The row blocks one after another, group by group."""
        return (_join_rows(tensors, self._groups),)

    def to_hf(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The row blocks."""
        return _split_rows(tensors[0], self._rows, self._groups)


def _split_rows(whole: Tensor, rows: Sequence[int], groups: int) -> tuple[Tensor, ...]:
    if groups == 1:
        return whole.split(list(rows))
    grouped = whole.reshape(groups, -1, *whole.shape[1:]).split([count // groups for count in rows], dim=1)
    return tuple(part.reshape(-1, *whole.shape[1:]) for part in grouped)


def _join_rows(parts: Sequence[Tensor], groups: int) -> Tensor:
    if groups == 1:
        return torch.cat(list(parts))
    row_shape = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *row_shape) for part in parts], dim=1).reshape(-1, *row_shape)


class GatedQkv(Mapping):
    """Attention with an output gate.

    Hugging Face stores q and gate of a head beside each other in `q_proj`; megatron-core's `linear_qkv` has, for each
    query group, [q of its heads | gate of its heads | k | v] (megatron/core/transformer/attention.py).
    """

    def __init__(
        self, q: str, k: str, v: str, megatron: str, *, heads: int, groups: int, head_dim: int, hidden: int
    ) -> None:
        self._heads, self._groups, self._head_dim, self._hidden = heads, groups, head_dim, hidden
        self.hf = (
            TensorSpec(name=q, shape=(2 * heads * head_dim, hidden)),
            TensorSpec(name=k, shape=(groups * head_dim, hidden)),
            TensorSpec(name=v, shape=(groups * head_dim, hidden)),
        )
        self.megatron = (TensorSpec(name=megatron, shape=(2 * (heads + groups) * head_dim, hidden)),)

    def to_megatron(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """q_proj, k_proj, v_proj -> linear_qkv."""
        q_gate, k, v = tensors
        group_heads = self._heads // self._groups
        q, gate = q_gate.view(self._groups, group_heads, 2, self._head_dim, self._hidden).unbind(2)
        grouped = [
            q.reshape(self._groups, -1, self._hidden),
            gate.reshape(self._groups, -1, self._hidden),
            k.view(self._groups, self._head_dim, self._hidden),
            v.view(self._groups, self._head_dim, self._hidden),
        ]
        return (torch.cat(grouped, dim=1).view(-1, self._hidden),)

    def to_hf(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """linear_qkv -> q_proj, k_proj, v_proj."""
        group_heads = self._heads // self._groups
        rows = group_heads * self._head_dim
        grouped = tensors[0].reshape(self._groups, -1, self._hidden)
        q, gate, k, v = grouped.split([rows, rows, self._head_dim, self._head_dim], dim=1)
        per_head = (self._groups, group_heads, self._head_dim, self._hidden)
        q_gate = torch.stack([q.reshape(per_head), gate.reshape(per_head)], dim=2)
        return (
            q_gate.view(-1, self._hidden),
            k.reshape(-1, self._hidden),
            v.reshape(-1, self._hidden),
        )


class ZeroCentred(Mapping):
    """A norm weight w that Megatron stores as w - 1, in fp32.

    Not invertible: fl(fl(w - 1) + 1) differs from w for most fp32 values below 0.5, so a converter keeps the original
    beside the checkpoint.
    """

    invertible = False

    def __init__(self, hf: str, megatron: str, shape: Shape) -> None:
        self.hf = (TensorSpec(name=hf, shape=shape),)
        self.megatron = (TensorSpec(name=megatron, shape=shape),)

    def to_megatron(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """w - 1 in fp32, whatever the dtype of w."""
        return (tensors[0].float() - 1,)

    def to_hf(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """w in fp32."""
        return (tensors[0].float() + 1,)
