"""Pickles from others, read without running anything that they ask for.

What a pickle makes can be far larger than the file: a tuple that holds one tuple twice, which again holds one twice,
takes a few bytes a level, and twice as long to hash, compare or print with every level. Others are nested so deeply
that a hash overflows the stack. So nothing is hashed or called before its parts were counted.
"""

from __future__ import annotations

import enum
import pickle
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from megatron_fp32.checkpoint.formats.nesting import is_small
from megatron_fp32.errors import CheckpointError

# What no checkpoint needs: memory of any promised size, buffers and classes from outside of the file.
_REFUSED = (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4)

_INTEGER_BYTES = 1024
"""Of the largest integer; Python prints those of up to 4300 digits."""

_KEY_PARTS = 64
_ARGUMENT_PARTS = 256


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

    def takes_state(self, instance: Any) -> bool:
        """Whether the pickle may set the attributes of an instance."""
        return isinstance(instance, OrderedDict)

    def is_inert(self, kind: type) -> bool:
        """Whether a class keeps the arguments and items that it gets, whatever they are, and does nothing with them."""
        return False

    def _check_call(self, function: Any, arguments: Any, keywords: Any = None) -> None:
        """Raise when calling it could take long: that depends on what the arguments are."""
        if type(arguments) is not tuple or (keywords is not None and type(keywords) is not dict):
            raise CheckpointError("it calls something without a tuple of arguments")
        if not isinstance(function, type):
            is_right = callable(function) and is_small((arguments, keywords), _ARGUMENT_PARTS)
        elif self.is_inert(function):
            is_right = True
        elif issubclass(function, enum.Enum):
            is_right = not keywords and all(type(value) in (int, str) for value in arguments)
        elif function in (set, frozenset, OrderedDict):
            is_right = not keywords and len(arguments) <= 1
            for items in arguments:
                _check_items(function, items)
        else:
            is_right = is_small((arguments, keywords) if keywords else arguments, _ARGUMENT_PARTS)
        if not is_right:
            raise CheckpointError(f"it calls {_name(function)} with arguments that cannot be meant for it")

    def _load_reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        self._check_call(function, arguments)
        self.stack[-1] = function(*arguments)

    dispatch[pickle.REDUCE[0]] = _load_reduce

    def _load_newobj(self) -> None:
        self._new(self.stack.pop(), {})

    dispatch[pickle.NEWOBJ[0]] = _load_newobj

    def _load_newobj_ex(self) -> None:
        keywords = self.stack.pop()
        self._new(self.stack.pop(), keywords)

    dispatch[pickle.NEWOBJ_EX[0]] = _load_newobj_ex

    def _new(self, arguments: Any, keywords: Any) -> None:
        kind = self.stack[-1]
        if not isinstance(kind, type):
            raise CheckpointError(f"it makes an instance of {_name(kind)}, which is not a class")
        self._check_call(kind, arguments, keywords)
        self.stack[-1] = kind.__new__(kind, *arguments, **keywords)

    def _instantiate(self, kind: Any, arguments: list[Any]) -> None:
        """What INST and OBJ share."""
        self._check_call(kind, tuple(arguments))
        super()._instantiate(kind, arguments)

    def _load_build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        # State for a class, a function or a member of an enumeration would change it for everybody.
        if isinstance(instance, type) or not self.takes_state(instance):
            raise CheckpointError(f"it sets the state of {_name(instance)}, which no checkpoint needs")
        # Looked up in the class: the pickle decides what the instance has.
        if hasattr(type(instance), "__setstate__"):
            instance.__class__.__setstate__(instance, state)
            return
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise CheckpointError(f"the state of {_name(instance)} is not a dictionary with names")
        if isinstance(instance, dict) and any(hasattr(dict, name) for name in state):
            raise CheckpointError(f"it replaces methods of {_name(instance)}")
        vars(instance).update({sys.intern(name): value for name, value in state.items()})

    dispatch[pickle.BUILD[0]] = _load_build

    def _load_dict(self) -> None:
        _check_keys(self.stack[::2])
        super().load_dict()

    dispatch[pickle.DICT[0]] = _load_dict

    def _load_setitem(self) -> None:
        self._check_target(self.stack[-3], dict)
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    dispatch[pickle.SETITEM[0]] = _load_setitem

    def _load_setitems(self) -> None:
        self._check_target(self.metastack[-1][-1], dict)
        _check_keys(self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEMS[0]] = _load_setitems

    def _load_additems(self) -> None:
        self._check_target(self.metastack[-1][-1], set)
        _check_keys(self.stack)
        super().load_additems()

    dispatch[pickle.ADDITEMS[0]] = _load_additems

    def _load_frozenset(self) -> None:
        _check_keys(self.stack)
        super().load_frozenset()

    dispatch[pickle.FROZENSET[0]] = _load_frozenset

    def _load_append(self) -> None:
        self._check_target(self.stack[-2], list)
        super().load_append()

    dispatch[pickle.APPEND[0]] = _load_append

    def _load_appends(self) -> None:
        self._check_target(self.metastack[-1][-1], list)
        super().load_appends()

    dispatch[pickle.APPENDS[0]] = _load_appends

    def _check_target(self, target: Any, kind: type) -> None:
        if not isinstance(target, kind) and not self.is_inert(type(target)):
            raise CheckpointError(f"it puts items into {_name(target)}, which is not a {kind.__name__}")

    def _load_long4(self) -> None:
        (length,) = struct.unpack("<i", self.read(4))
        if not 0 <= length <= _INTEGER_BYTES:
            raise CheckpointError(f"it holds an integer of {length} bytes")
        self.append(int.from_bytes(self.read(length), "little", signed=True))

    dispatch[pickle.LONG4[0]] = _load_long4

    # Strictly: halves of surrogate pairs cannot be printed, and no file has such a name.
    def _load_short_binunicode(self) -> None:
        self.append(str(self.read(self.read(1)[0]), "utf-8"))

    dispatch[pickle.SHORT_BINUNICODE[0]] = _load_short_binunicode

    def _load_binunicode(self) -> None:
        self.append(str(self.read(*struct.unpack("<I", self.read(4))), "utf-8"))

    dispatch[pickle.BINUNICODE[0]] = _load_binunicode

    def _load_binunicode8(self) -> None:
        (length,) = struct.unpack("<Q", self.read(8))
        self.append(str(self.read(min(length, sys.maxsize)), "utf-8"))

    dispatch[pickle.BINUNICODE8[0]] = _load_binunicode8

    def _load_unicode(self) -> None:
        super().load_unicode()
        self.stack[-1].encode()

    dispatch[pickle.UNICODE[0]] = _load_unicode


def _check_items(kind: type, items: Any) -> None:
    """What a set or an ordered dictionary is made from."""
    if not isinstance(items, list | tuple | set | frozenset | dict):
        raise CheckpointError(f"it makes a {kind.__name__} from {_name(items)}")
    if kind is OrderedDict and not isinstance(items, dict):
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in items):
            raise CheckpointError(f"it makes a {kind.__name__} from something else than pairs")
        items = [key for key, _ in items]
    _check_keys(items)


def _check_keys(keys: Iterable[Any]) -> None:
    """Raise for what takes long to hash or to compare."""
    for key in keys:
        kind = type(key)
        if kind is str or getattr(kind, "__hash__", None) is object.__hash__:
            continue
        # A dictionary of integers that have the same hash takes quadratic time; there are none below.
        if kind is int and not -(2**60) < key < 2**60:
            raise CheckpointError("it has a key that is an integer of more than 60 bits")
        if kind is complex or not is_small(key, _KEY_PARTS):
            raise CheckpointError(f"it has {_name(key)} for a key, or in a set, that has too many parts for that")


def _name(value: Any) -> str:
    return repr(value)[:200] if isinstance(value, type) else f"a {type(value).__name__}"


def enum_member(owner: Any, name: Any) -> Any:
    """Stands for `getattr`: Python 3.11.2 and its like pickle members of enumerations as `getattr(class, name)`."""
    is_member = isinstance(owner, type) and issubclass(owner, enum.Enum) and type(name) is str
    if not is_member or name not in owner.__members__:
        shown = repr(name[:200]) if isinstance(name, str) else _name(name)
        raise CheckpointError(f"it asks for {shown} of {_name(owner)}, which no checkpoint needs")
    return owner[name]
