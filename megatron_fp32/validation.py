"""Checks of arguments for public functions. Each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Raise TypeError unless `value` is True or False: Python would treat another value, such as "false", as True."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: object, *, least: int = 1) -> None:
    """Raise TypeError unless `value` is an int, ValueError when it is smaller than `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name: str, value: object, *, least: float = 0.0, positive: bool = False) -> None:
    """Raise TypeError unless `value` is a number, ValueError if it is NaN, below `least`, or 0 with `positive`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not value >= least or (positive and not value > 0):
        raise ValueError(f"{name} must be {'positive' if positive else f'at least {least:g}'}, got {value}")


def check_finite(name: str, value: object, *, positive: bool = False) -> None:
    """Raise TypeError unless `value` is a number, ValueError if it is not finite, or 0 or less with `positive`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value) or (positive and value <= 0):
        raise ValueError(f"{name} must be {'positive and ' if positive else ''}finite, got {value}")


def check_path(name: str, value: object, *, optional: bool = False) -> None:
    """Check that `value` is a path, or None with `optional`.

    Raises:
        TypeError: for a value that is not a str or a Path.
        ValueError: for a path that is empty or holds a null byte.
    """
    if optional and value is None:
        return
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"{name} must be a path (str or Path){' or None' if optional else ''}, got {value!r}")
    if not os.fspath(value):
        raise ValueError(f"{name} must be a path, got an empty text")
    if "\0" in str(value):
        raise ValueError(f"{name} must be a path, got a text with a null byte: {str(value)!r}")


def check_callable(name: str, value: object) -> None:
    """Raise TypeError unless `value` is None or callable."""
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, got {value!r}")
