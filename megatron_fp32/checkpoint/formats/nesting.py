"""How large and how deep a value is, counted without recursion and without hashing or comparing what is in it."""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import Any

from megatron_fp32.errors import CheckpointError

_LEAVES = frozenset({str, bytes, int, float, bool, type(None)})


def is_small(value: Any, limit: int) -> bool:
    """Whether a value has at most `limit` parts, those of its parts included, each as often as it is there."""
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
    """Refuse what takes others too long, or too deep a recursion, to print, compare or copy.

    Args:
        value: of any kind.
        most_parts: it may have, those of its parts included, each as often as it is there.
        most_levels: of values in values.

    Raises:
        CheckpointError: when it has more, or holds itself.
    """
    # Of each value that has parts: how many there are below it, and on how many levels. None: not known yet.
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
                    raise CheckpointError(f"a {type(item).__name__} in it holds itself")
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
    """What a value holds."""
    if isinstance(value, (tuple, list, set, frozenset)):
        return value
    # A class and a member of an enumeration are the same for everybody.
    attributes = not isinstance(value, type | enum.Enum) and hasattr(value, "__dict__")
    parts = list(vars(value).values()) if attributes else []
    if isinstance(value, dict):
        # Not its own methods: attributes may have their names.
        parts += [*dict.keys(value), *dict.values(value)]
    return parts
