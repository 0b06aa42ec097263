"""Names and shapes of tensors, and of elements of stacked tensors."""

from __future__ import annotations

import dataclasses

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor, or one element of a stack of tensors that a checkpoint holds under one name."""

    name: str
    shape: Shape
    """Shape of the tensor itself, without the axes of the stack."""
    index: Shape = ()
    """The element of the stack: one number for each axis of the stack. () for a tensor that is not stacked."""
    stack: Shape = ()
    """Sizes of the stack's axes, which are the first axes of the checkpoint's tensor."""

    @property
    def stored_shape(self) -> Shape:
        """Shape of the tensor that the checkpoint holds under `name`."""
        return (*self.stack, *self.shape)

    def __str__(self) -> str:
        """The name and the element, such as `experts.down_proj[3]`."""
        return f"{self.name}{list(self.index)}" if self.index else self.name

    def in_stack(self, index: int, size: int, name: str | None = None) -> TensorSpec:
        """This tensor as element `index` of a stack of `size`. The new axis comes before existing axes of stacks."""
        return dataclasses.replace(self, name=name or self.name, index=(index, *self.index), stack=(size, *self.stack))
