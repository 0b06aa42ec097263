"""The checksum of `checksum.py` on a GPU."""

from __future__ import annotations

import contextlib

from megatron_fp32 import needs_triton  # noqa: F401

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fp32.transfer.checksum_numpy import FIRST, PLACE, SECOND

_BLOCK = 2048
_PROGRAMS = 2048
"""Enough for every multiprocessor of a large GPU; each program takes every `_PROGRAMS`-th block."""


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


_PLACE, _FIRST, _SECOND = (tl.constexpr(_signed(word)) for word in (PLACE, FIRST, SECOND))


@triton.jit
def _shifted(words, bits: tl.constexpr):  # type: ignore[no-untyped-def]
    # Triton shifts int64 with the sign: the mask makes it a shift of unsigned words.
    return (words >> bits) & ((1 << (64 - bits)) - 1)


@triton.jit
def _checksum_kernel(words, out, count, step, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    start = tl.program_id(0).to(tl.int64) * BLOCK
    total = tl.zeros([BLOCK], dtype=tl.int64)
    while start < count:
        at = start + tl.arange(0, BLOCK)
        inside = at < count
        mixed = (tl.load(words + at, mask=inside, other=0) ^ (at * _PLACE)) * _FIRST
        mixed ^= _shifted(mixed, 29)
        mixed *= _SECOND
        mixed ^= _shifted(mixed, 32)
        total += tl.where(inside, mixed, 0)
        start += step
    tl.atomic_add(out, tl.sum(total, axis=0), sem="relaxed")


def add_checksum(words: Tensor, out: Tensor) -> None:
    """Add the checksum of int64 words [m] to out [1]."""
    count = words.numel()
    if count == 0:
        return
    programs = min(_PROGRAMS, triton.cdiv(count, _BLOCK))
    with torch.cuda.device(words.device) if words.is_cuda else contextlib.nullcontext():
        _checksum_kernel[(programs,)](words, out, count, programs * _BLOCK, BLOCK=_BLOCK, num_warps=8)
