"""The checksum by which a trainer and an engine compare a buffer, at the speed of memory.

The buffer is a sequence of little-endian 64-bit words w_0, w_1, ... All arithmetic is modulo 2^64:

    h = (w_i XOR (i * C1)) * C2;   h = h XOR (h >> 29);   h = h * C3;   h = h XOR (h >> 32);   checksum = sum of h

C1, C2 and C3 are the constants of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators,
2014). The sum depends on every word and on its place, and its order does not matter, so that the threads of a GPU may
add in any order. It finds faults. It does not keep out an attacker, who can choose bytes with an equal sum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_fp32.transfer.checksum_words import FIRST, PLACE, SECOND

_BLOCK = 1 << 17
"""Words that NumPy takes at a time: 1 MiB, which stays in a core's cache."""


def write_checksum(payload: Tensor, out: Tensor) -> None:
    """Write the checksum of a buffer. On CUDA the host does not wait.

    Args:
        payload: uint8 [n], contiguous, n a multiple of 8, at an address that is a multiple of 8.
        out: uint8 [8] on the same device, at an address that is a multiple of 8.

    Raises:
        TypeError: for another dtype.
        ValueError: for another size, or for tensors on two devices.
    """
    _check("payload", payload)
    _check("out", out)
    if out.numel() != 8 or out.device != payload.device:
        raise ValueError(f"out must have 8 bytes on {payload.device}, got {out.numel()} bytes on {out.device}")
    words = out.view(torch.int64)
    if payload.device.type == "cpu":
        words.numpy().view(np.uint64)[0] = _numpy_checksum(payload.numpy().view(np.uint64))
        return
    from megatron_fp32.transfer.checksum_kernel import add_checksum

    words.zero_()
    add_checksum(payload.view(torch.int64), words)


def checksums_equal(payload: Tensor, stored: Tensor) -> Tensor:
    """Whether a buffer has this checksum: a bool [] on the buffer's device. On CUDA the host does not wait.

    Args:
        payload: see `write_checksum`.
        stored: uint8 [8], what `write_checksum` has written for the buffer that was sent.
    """
    found = torch.empty(8, dtype=torch.uint8, device=payload.device)
    write_checksum(payload, found)
    return (found == stored).all()


def _numpy_checksum(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.uint64:
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


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {tensor.dtype}")
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() % 8 or tensor.data_ptr() % 8:
        raise ValueError(
            f"{name} must be contiguous, with one dimension and whole 64-bit words, got shape {tuple(tensor.shape)} "
            f"at the address {tensor.data_ptr()}"
        )
