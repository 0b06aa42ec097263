"""Read untrusted pickles without running code that they name.

The content of a pickle can be far larger than the file. A tuple that holds a tuple twice, which holds another tuple
twice, and so on, takes a few bytes for each level, but each level doubles the time to hash, compare or print it. Other
pickles are nested so deeply that hashing overflows the stack. So the parts of a value are counted before it is hashed,
or passed to a function.
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

# Checkpoints do not need these: memory of any size, and buffers and classes from outside of the file.
_REFUSED = (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4)

_INTEGER_BYTES = 1024
"""Bytes of the largest integer. Python only prints integers of up to 4300 digits."""

_KEY_PARTS = 64
_ARGUMENT_PARTS = 256


class RestrictedUnpickler(pickle._Unpickler):
    """An unpickler that only uses classes and functions which `find_class` of a subclass admits.

    It is based on Python's unpickler in Python, which is half as fast as the one in C. The one in C allocates memory
    for any index that a damaged pickle writes to.
    """

    dispatch: dict[int, Any] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in {byte[0] for byte in _REFUSED}
    }

    def find_class(self, module: str, name: str) -> Any:
        """Raise CheckpointError. A subclass returns the classes that it admits, and calls this for all others."""
        raise CheckpointError(f"it asks for {f'{module}.{name}'[:200]}, which no checkpoint needs")

    def takes_state(self, instance: Any) -> bool:
        """Whether the pickle may set the attributes of an instance."""
        return isinstance(instance, OrderedDict)

    def is_inert(self, kind: type) -> bool:
        """Whether a class only stores its arguments and items, so that any arguments are safe."""
        return False

    def _check_call(self, function: Any, arguments: Any, keywords: Any = None) -> None:
        """Raise CheckpointError if the arguments do not fit the function, or could make the call take long."""
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
            raise CheckpointError(f"it calls {_name(function)} with arguments of a wrong type, or too many")

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
        """Make an instance, for the opcodes INST and OBJ."""
        self._check_call(kind, tuple(arguments))
        super()._instantiate(kind, arguments)

    def _load_build(self) -> None:
        state = self.stack.pop()
        instance = self.stack[-1]
        # The state of a class, a function or a member of an enumeration would change the running program.
        if isinstance(instance, type) or not self.takes_state(instance):
            raise CheckpointError(f"it sets the state of {_name(instance)}, which no checkpoint needs")
        # Looked up in the class, because the pickle sets the attributes of the instance.
        if hasattr(type(instance), "__setstate__"):
            instance.__class__.__setstate__(instance, state)
            return
        if type(state) is not dict or not all(type(name) is str for name in state):
            raise CheckpointError(f"the state of {_name(instance)} is not a dictionary with text keys")
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

    # Text is decoded strictly, because halves of surrogate pairs cannot be printed, and file names do not have them.
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
    """Refuse unsafe arguments of a set or an ordered dictionary."""
    if not isinstance(items, list | tuple | set | frozenset | dict):
        raise CheckpointError(f"it makes a {kind.__name__} from {_name(items)}")
    if kind is OrderedDict and not isinstance(items, dict):
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in items):
            raise CheckpointError(f"it makes a {kind.__name__} from items that are not pairs")
        items = [key for key, _ in items]
    _check_keys(items)


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys that take long to hash or to compare."""
    for key in keys:
        kind = type(key)
        if kind is str or getattr(kind, "__hash__", None) is object.__hash__:
            continue
        # A dictionary takes quadratic time for integers with equal hashes. Integers below this limit have unequal ones.
        if kind is int and not -(2**60) < key < 2**60:
            raise CheckpointError("it has a key that is an integer of more than 60 bits")
        if kind is complex or not is_small(key, _KEY_PARTS):
            raise CheckpointError(f"it has a key, or an element of a set, with too many parts: {_name(key)}")


def _name(value: Any) -> str:
    return repr(value)[:200] if isinstance(value, type) else f"a {type(value).__name__}"


def enum_member(owner: Any, name: Any) -> Any:
    """A safe `getattr`. Python 3.11.2 and others pickle a member of an enumeration as `getattr(class, name)`."""
    is_member = isinstance(owner, type) and issubclass(owner, enum.Enum) and type(name) is str
    if not is_member or name not in owner.__members__:
        shown = repr(name[:200]) if isinstance(name, str) else _name(name)
        raise CheckpointError(f"it asks for {shown} of {_name(owner)}, which no checkpoint needs")
    return owner[name]
