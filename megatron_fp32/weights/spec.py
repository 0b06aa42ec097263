"""Names and shapes of tensors, and of elements of stacked tensors."""

from __future__ import annotations

import dataclasses

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
        """Shape of the tensor that the checkpoint holds under `name`."""
        return (*self.stack, *self.shape)

    def __str__(self) -> str:
        """The name, and which element: `experts.down_proj[3]`."""
        return f"{self.name}{list(self.index)}" if self.index else self.name

    def in_stack(self, index: int, size: int, name: str | None = None) -> TensorSpec:
        """As element `index` of a stack of `size`, outside of the stacks that it is in already."""
        return dataclasses.replace(self, name=name or self.name, index=(index, *self.index), stack=(size, *self.stack))
