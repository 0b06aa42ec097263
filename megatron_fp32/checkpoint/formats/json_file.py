"""Reads JSON files strictly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_fp32.errors import CheckpointError, summary

JSON_LIMIT = 2**29
"""Largest JSON file in bytes. An index of a million tensors has a quarter of this size."""

_DIGITS = 300
_JSON_LEVELS = 100

_LONG_NUMBER = re.compile(rb"[0-9]{%d}" % _DIGITS)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(content: bytes, *, finite: bool = True) -> Any:
    """Parse JSON strictly, so that every reader gets equal values and the values can be printed.

    - UTF-8 without halves of surrogate pairs.
    - No duplicate keys.
    - Finite numbers of at most 300 digits.
    - At most 100 levels of objects and lists.

    Args:
        content: the bytes of the file.
        finite: pass False to admit Infinity and NaN, which Python writes and released configs have
            (`time_step_limit` of models with Mamba 2).

    Raises:
        ValueError: when the content is not such JSON.
    """
    options: dict[str, Any] = {"parse_int": _integer} if _LONG_NUMBER.search(content) else {}
    if finite:
        options |= {"parse_constant": _finite, "parse_float": _finite}
    try:
        value = json.loads(
            content.decode(),
            object_pairs_hook=_without_duplicates,
            **options,
        )
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check_levels(value)
    if _SURROGATE.search(content):
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_json(path: Path, what: str, *, finite: bool = True) -> Any:
    """Read a JSON file; see `parse_json`.

    Args:
        path: path of the file.
        what: the kind of file that is expected, for messages.
        finite: see `parse_json`.

    Raises:
        CheckpointError: naming the file, when it cannot be read.
    """
    try:
        size = path.stat().st_size
        if size > JSON_LIMIT:
            raise ValueError(f"it has {size} bytes, expected at most {JSON_LIMIT}")
        return parse_json(path.read_bytes(), finite=finite)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a {what}: {summary(error)}") from error


def read_json_object(path: Path, what: str = "JSON object", *, finite: bool = True) -> dict[str, Any]:
    """Read a JSON file that holds an object; see `read_json`.

    Raises:
        CheckpointError: naming the file, when it cannot be read or holds something else.
    """
    content = read_json(path, what, finite=finite)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _check_levels(value: Any) -> None:
    level = [value]
    for _ in range(_JSON_LEVELS + 1):
        level = [part for item in level for part in _inner(item) if type(part) in (dict, list)]
        if not level:
            return
    raise ValueError(f"nested too deeply: more than {_JSON_LEVELS} levels")


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits, expected at most {_DIGITS}")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is not a finite number")
    return value


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"it has the key {key[:200]!r} twice")
        found[key] = value
    return found
