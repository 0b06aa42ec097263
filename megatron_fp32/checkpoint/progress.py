"""How long operations report their progress."""

from __future__ import annotations

from collections.abc import Callable

ProgressCallback = Callable[[str, int, int], None]
"""`progress(action, nbytes, total)`: an action was done to a tensor of `nbytes` bytes, of `total` bytes in all.

Conversions call it with `"write"` after each tensor, and with `"verify"` after some hundred megabytes that were read
back. Comparisons call it with `"compare"` after each tensor.
"""
