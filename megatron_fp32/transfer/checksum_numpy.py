"""The constants of the checksum in `checksum.py`, and the checksum on the CPU."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

PLACE, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""C1, C2 and C3."""

_BLOCK = 1 << 17
"""Words that NumPy takes at a time. They are 1 MiB, so that temporaries stay small, whatever the buffer's size is."""


def numpy_checksum(words: npt.NDArray[np.uint64]) -> np.uint64:
    """The checksum of uint64 words [m]."""
    total = np.uint64(0)
    shift29, shift32 = np.uint64(29), np.uint64(32)
    with np.errstate(over="ignore"):  # the arithmetic is modulo 2^64
        for start in range(0, len(words), _BLOCK):
            block = words[start : start + _BLOCK]
            places = np.arange(start, start + len(block), dtype=np.uint64)
            mixed = (block ^ (places * np.uint64(PLACE))) * np.uint64(FIRST)
            mixed ^= mixed >> shift29
            mixed *= np.uint64(SECOND)
            mixed ^= mixed >> shift32
            total += mixed.sum(dtype=np.uint64)
    return total
