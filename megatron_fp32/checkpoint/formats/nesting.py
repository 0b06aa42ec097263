"""Count the size and depth of a nested value, without recursion and without hashing or comparing its parts."""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import Any

from megatron_fp32.errors import CheckpointError

_LEAVES = frozenset({str, bytes, int, float, bool, type(None)})


def is_small(value: Any, limit: int) -> bool:
    """Whether a value has at most `limit` parts on all levels together. A part that recurs counts each time."""
    left, pending = limit - 1, [value]
    while pending:
        item = pending.pop()
        if type(item) in _LEAVES:
            continue
        parts = _parts(item)
        left -= len(parts)
        if left < 0:
            return False
        pending += parts
    return True


def check_nesting(value: Any, *, most_parts: int, most_levels: int = 100) -> None:
    """Refuse a value that would take too long, or too deep a recursion, to print, compare or copy.

    Args:
        value: any value.
        most_parts: most parts on all levels together. A part that recurs counts each time.
        most_levels: most levels of values in values.

    Raises:
        CheckpointError: when the value has more parts or levels, or contains itself.
    """
    # For each value with parts: (number of parts below it, number of levels), or None while it is being counted.
    known: dict[int, tuple[int, int] | None] = {}
    pending: list[tuple[Any, Collection[Any] | None]] = [(value, None)]
    while pending:
        item, parts = pending.pop()
        if parts is None:
            parts = () if type(item) in _LEAVES else _parts(item)
            if not parts:
                continue
            if id(item) in known:
                if known[id(item)] is None:
                    raise CheckpointError(f"a {type(item).__name__} in it contains itself")
                continue
            known[id(item)] = None
            pending.append((item, parts))
            pending += [(part, None) for part in parts]
            continue
        below = [known.get(id(part)) or (1, 1) for part in parts]
        size, levels = 1 + sum(count for count, _ in below), 1 + max((depth for _, depth in below), default=0)
        if size > most_parts or levels > most_levels:
            raise CheckpointError(
                f"it is nested on more than {most_levels} levels, or has more than {most_parts} parts"
            )
        known[id(item)] = size, levels


def _parts(value: Any) -> Collection[Any]:
    """The values in a value."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return value
    # Attributes of a class or of a member of an enumeration do not come from the file.
    attributes = not isinstance(value, type | enum.Enum) and hasattr(value, "__dict__")
    parts = list(vars(value).values()) if attributes else []
    if isinstance(value, dict):
        # dict's methods are called through the class, because attributes of the value may have their names.
        parts += [*dict.keys(value), *dict.values(value)]
    return parts
