"""Pickles from others, read without running anything that they ask for."""

from __future__ import annotations

import enum
import pickle
from typing import Any

from megatron_fp32.checkpoint.tensors import CheckpointError

# What no checkpoint needs: memory of any promised size, buffers and classes from outside of the file.
_REFUSED = (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4)


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that finds only what a subclass's `find_class` admits.

    It is the one in Python, not the one in C, which reserves memory for any index that a damaged pickle writes to. It
    is half as fast.
    """

    dispatch: dict[int, Any] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in {byte[0] for byte in _REFUSED}
    }

    def find_class(self, module: str, name: str) -> Any:
        """Raises CheckpointError: a subclass admits what it needs, and leaves the rest to this."""
        raise CheckpointError(f"it asks for {f'{module}.{name}'[:200]}, which no checkpoint needs")

    def _load_build(self) -> None:
        # State for a class or a function would change it for everybody.
        if callable(self.stack[-2]):
            raise CheckpointError(f"it sets the state of {self.stack[-2]!r}, which no checkpoint needs")
        super().load_build()

    dispatch[pickle.BUILD[0]] = _load_build


def enum_member(owner: Any, name: str) -> Any:
    """Stands for `getattr`: Python 3.11.2 and its like pickle members of enumerations as `getattr(class, name)`."""
    if not (isinstance(owner, type) and issubclass(owner, enum.Enum)) or name not in owner.__members__:
        raise CheckpointError(f"it asks for {name!r} of {owner!r}, which no checkpoint needs")
    return owner[name]
