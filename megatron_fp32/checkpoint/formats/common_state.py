"""The common state of a checkpoint: arguments, iteration, schedulers and settings of the optimizer, without tensors.

megatron-core up to 0.18 saves it in `common.pt`, later releases in the object `common_state`
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
from megatron_fp32.weights.tensors import empty_tensor

if TYPE_CHECKING:
    from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader

_OBJECT = "common_state/shard_0_1"

_STAND_INS = 4096
"""How many classes may be replaced by `Opaque`. Each takes one or two kilobytes."""

_LEAST_PARTS = 2**16

_KINDS = {
    ("argparse", "Namespace"): Namespace,
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("signal", "Signals"): signal.Signals,
    ("torch", "device"): torch.device,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    # A path is read as a pure path, because it does not refer to this machine.
    **{
        (module, start + name): kind
        for module in ("pathlib", "pathlib._local")
        for name, kind in (("PosixPath", PurePosixPath), ("WindowsPath", PureWindowsPath))
        for start in ("", "Pure")
    },
}


class Opaque:
    """A placeholder for an object of a class that is not on the allow-list, such as a class of Megatron.

    Attributes:
        arguments: the arguments of the class; for a member of an enumeration, its value.
        state: the object's attributes, usually a dictionary; None if it has none.
        items: the items of a list, or pairs of keys and values of a dictionary.
    """

    arguments: tuple[Any, ...]
    state: Any
    items: list[Any]

    def __new__(cls, *arguments: Any, **_: Any) -> Opaque:
        """Make a placeholder from any arguments."""
        made = super().__new__(cls)
        made.arguments, made.state, made.items = arguments, None, []
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, item: Any) -> None:
        """Append an item, like a list."""
        self.items.append(item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{type(self).__qualname__} {self.arguments}>"


def read_common_state(reader: TorchDistReader) -> dict[str, Any]:
    """Read the common state of a checkpoint. As in megatron-core, `common.pt` comes first if there is one.

    No code from the file is run. Plain Python values, tensors, dtypes, NumPy numbers, paths, signals and namespaces are
    read. Every other object becomes an `Opaque`. For example, `arguments` of the placeholder of megatron-core's
    `AttnBackend` has the member's value, or the member's name if Python pickled that (3.11.2 does).

    Args:
        reader: the reader of the checkpoint.

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
            raise CheckpointError(f"{path}: {_OBJECT!r} must hold a list of one object")
        found = found[0]
    else:
        raise CheckpointError(f"{reader.directory} has neither common.pt nor the object {_OBJECT!r}")
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CheckpointError(f"{path}: the common state must be a dictionary with text keys")
    return found


def _read(path: Path, offset: int, length: int | None) -> Any:
    with open_torch_file(path, "the common state", offset, length) as file:
        found = _ObjectUnpickler(file).load()
        # One object may be in many places. An object that is in one place takes at least a byte.
        check_nesting(found, most_parts=_LEAST_PARTS + 16 * file.size)
    return found


class _Dtype:
    """The name of a NumPy dtype. numpy.dtype itself would accept any state without a check."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name, self.order = _text(name), "<"

    def __setstate__(self, state: Any) -> None:
        self.order = _text(state[1])


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 40:
        raise ValueError("a NumPy dtype without a name")
    return value


def _numpy_scalar(dtype: Any, content: Any) -> Any:
    if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
        raise TypeError("a NumPy number without a dtype or without bytes")
    if dtype.name not in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"):
        raise ValueError(f"a NumPy number of the unknown dtype {dtype.name[:40]!r}")
    (value,) = np.frombuffer(content, ("=" if dtype.order == "|" else dtype.order) + dtype.name)
    return value


def _bytes(text: Any, encoding: Any) -> bytes:
    """A replacement of `_codecs.encode`, because old protocols pickle bytes as text."""
    if not isinstance(text, str) or not isinstance(encoding, str):
        raise TypeError("bytes that are not pickled as text")
    if encoding != "latin1":
        raise ValueError(f"bytes that are pickled as text in {encoding[:40]!r}, expected 'latin1'")
    return text.encode(encoding)


class _ObjectUnpickler(TensorUnpickler):
    """Admits classes that do nothing, reads tensors, and makes an `Opaque` for every other object."""

    def __init__(self, file: TorchFile) -> None:
        super().__init__(file)
        self._stand_ins: dict[tuple[str, str], type[Opaque]] = {}
        self._left = file.size

    def make_tensor(self, stored: StoredTensor) -> Tensor:
        """Read a tensor. All tensors together may not take more memory than the file has bytes."""
        tensor = empty_tensor(stored.shape, stored.dtype)
        self._left -= tensor.nbytes
        if self._left < 0:
            raise ValueError("its tensors are larger than the file")
        self._file.read_into(stored, (), tensor)
        return tensor

    def find_class(self, module: str, name: str) -> Any:
        """The class, or a placeholder class if it is not admitted."""
        if module == "__builtin__":  # the name in Python 2 and old protocols
            module = "builtins"
        if (module, name) in _KINDS:
            return _KINDS[module, name]
        if module == "signal" and name in signal.Signals.__members__:
            # Some versions, such as Python 3.11.2, pickle a signal as a name of its module.
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
        """Plain namespaces and placeholders take any state."""
        return isinstance(instance, Namespace | SimpleNamespace | Opaque | _Dtype) or super().takes_state(instance)

    def is_inert(self, kind: type) -> bool:
        """Placeholders are inert."""
        return issubclass(kind, Opaque)

    def _member(self, owner: Any, name: Any) -> Any:
        return owner(name) if isinstance(owner, type) and issubclass(owner, Opaque) else enum_member(owner, name)

    def _stand_in(self, module: str, name: str) -> type[Opaque]:
        if (module, name) not in self._stand_ins:
            if len(self._stand_ins) == _STAND_INS:
                raise CheckpointError(f"it uses more than {_STAND_INS} unknown classes")
            self._stand_ins[module, name] = type(name, (Opaque,), {"__module__": module})
        return self._stand_ins[module, name]
