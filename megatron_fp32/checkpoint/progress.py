"""The callback with which conversions and comparisons report progress."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""`progress(action, nbytes, total)`: `action` is done for another `nbytes` bytes of `total` bytes.

Conversions call it with `"write"` after each tensor, and with `"verify"` after every few hundred megabytes that were
read back. Comparisons call it with `"compare"` after each tensor.
"""
