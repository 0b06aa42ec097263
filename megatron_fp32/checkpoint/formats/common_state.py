"""What a trainer saved besides tensors: arguments, iteration, schedulers, settings of the optimizer.

megatron-core up to 0.18 keeps it in `common.pt`, later releases in the object `common_state`
(megatron/core/dist_checkpointing/serialization.py, `load_common_state_dict`).
"""

from __future__ import annotations

import os
import signal
from argparse import Namespace
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_fp32.checkpoint.formats.nesting import check_nesting
from megatron_fp32.checkpoint.formats.pickles import enum_member
from megatron_fp32.checkpoint.formats.torch_file import StoredTensor, TensorUnpickler, TorchFile, open_torch_file
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import unfilled

if TYPE_CHECKING:
    from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader

_OBJECT = "common_state/shard_0_1"

_STAND_INS = 4096
"""Classes that may be stood in for: each takes a kilobyte or two."""

_LEAST_PARTS = 2**16

_KINDS = {
    ("argparse", "Namespace"): Namespace,
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("signal", "Signals"): signal.Signals,
    ("torch", "device"): torch.device,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    # Paths are names here, not places on this machine.
    **{
        (module, start + name): kind
        for module in ("pathlib", "pathlib._local")
        for name, kind in (("PosixPath", PurePosixPath), ("WindowsPath", PureWindowsPath))
        for start in ("", "Pure")
    },
}


class Opaque:
    """Stands for an object of a class that is not admitted, such as Megatron's own. It does nothing.

    Attributes:
        arguments: what the class would have been called with: the value of a member of an enumeration.
        state: its attributes, as a rule in a dictionary; None when it has none.
        items: of a list; pairs of keys and values of a dictionary.
    """

    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *arguments: Any, **_: Any) -> Opaque:
        """Never fails."""
        made = super().__new__(cls)
        made.arguments, made.state, made.items = arguments, None, []
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Take in an item, as a list does."""
        self.items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__} {self.arguments}>"


def read_common_state(reader: TorchDistReader) -> dict[str, Any]:
    """The common state of a checkpoint, from `common.pt` where there is one, as megatron-core does.

    Nothing in it is run. What is not plain Python, a tensor, a dtype, a number of numpy's, a path, a signal or a
    namespace comes as `Opaque`: an `AttnBackend` of megatron-core is one whose `arguments` hold its value, or its name
    where Python pickles that (3.11.2 does).

    Args:
        reader: of the checkpoint.

    Raises:
        CheckpointError: naming the file, when it is damaged, or there is no common state.
    """
    path = reader.directory / "common.pt"
    if os.path.isfile(path):
        found = _read(path, 0, None)
    elif _OBJECT in reader.objects:
        path, offset, length = reader.place_of_object(_OBJECT)
        found = _read(path, offset, length)
        if type(found) is not list or len(found) != 1:
            raise CheckpointError(f"{path}: {_OBJECT!r} is not a list of one")
        found = found[0]
    else:
        raise CheckpointError(f"{reader.directory} holds neither common.pt nor {_OBJECT!r}")
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CheckpointError(f"{path}: the common state is not a dictionary with names")
    return found


def _read(path: Path, offset: int, length: int | None) -> Any:
    with open_torch_file(path, "the common state", offset, length) as file:
        found = _ObjectUnpickler(file).load()
        # Much may be there more than once; what is there once takes a byte or more.
        check_nesting(found, most_parts=_LEAST_PARTS + 16 * file.size)
    return found


class _Dtype:
    """A dtype of numpy's, by name: numpy's own takes any state and believes it."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name, self.order = _text(name), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 40:
        raise ValueError("a dtype of numpy's without a name")
    return value


def _numpy_scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
        raise TypeError("a number of numpy's without a dtype or without bytes")
    if dtype.name not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise ValueError(f"a number of dtype {dtype.name[:40]!r}")
    (value,) = np.frombuffer(content, ("=" if dtype.order == "|" else dtype.order) + dtype.name)
    return value


def _bytes(text: Any, encoding: Any) -> bytes:
    """Stands for `_codecs.encode`: old protocols pickle bytes as text."""
    if not isinstance(text, str) or not isinstance(encoding, str):
        raise TypeError("bytes from something else than text")
    if encoding != "latin1":
        raise ValueError(f"bytes as text in {encoding[:40]!r}")
    return text.encode(encoding)


class _ObjectUnpickler(TensorUnpickler):
    """Admits what is inert, reads tensors, and puts `Opaque` in the place of everything else."""

    def __init__(self, file: TorchFile) -> None:
        super().__init__(file)
        self._stand_ins: dict[tuple[str, str], type[Opaque]] = {}
        self._left = file.size

    def make_tensor(self, stored: StoredTensor) -> Tensor:
        """Read it; all of them together do not take more memory than the file has bytes."""
        tensor = unfilled(stored.shape, stored.dtype)
        self._left -= tensor.nbytes
        if self._left < 0:
            raise ValueError("its tensors are larger than the file")
        self._file.read_into(stored, (), tensor)
        return tensor

    def find_class(self, module: str, name: str) -> Any:
        """Never raises."""
        if module == "__builtin__":  # as Python 2 and old protocols call it
            module = "builtins"
        if (module, name) in _KINDS:
            return _KINDS[module, name]
        if module == "signal" and name in signal.Signals.__members__:
            # Python 3.11.2 and its like pickle a signal as a name of its module.
            return signal.Signals[name]
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return _numpy_scalar
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("_codecs", "encode"):
            return _bytes
        if (module, name) == ("builtins", "getattr"):
            return self._member
        try:
            return super().find_class(module, name)
        except CheckpointError:
            return self._stand_in(module, name)

    def takes_state(self, instance: Any) -> bool:
        """Plain namespaces, and stand-ins."""
        return isinstance(instance, Namespace | SimpleNamespace | Opaque | _Dtype) or super().takes_state(instance)

    def is_inert(self, kind: type) -> bool:
        """Stand-ins are."""
        return issubclass(kind, Opaque)

    def _member(self, owner: Any, name: Any) -> Any:
        return owner(name) if isinstance(owner, type) and issubclass(owner, Opaque) else enum_member(owner, name)

    def _stand_in(self, module: str, name: str) -> type[Opaque]:
        if (module, name) not in self._stand_ins:
            if len(self._stand_ins) == _STAND_INS:
                raise CheckpointError(f"it asks for more than {_STAND_INS} classes")
            self._stand_ins[module, name] = type(name, (Opaque,), {"__module__": module})
        return self._stand_ins[module, name]
