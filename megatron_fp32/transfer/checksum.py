"""The checksum by which a trainer and an engine compare a buffer, at the speed of memory.

The buffer has n bytes, and n is a multiple of 8. It is a sequence of little-endian 64-bit words w_0, w_1, ...
All arithmetic is modulo 2^64:

    h = (w_i XOR (i * C1)) * C2;   h = h XOR (h >> 29);   h = h * C3;   h = h XOR (h >> 32);   checksum = sum of h

The checksum of an empty buffer is 0. C1, C2 and C3 are the constants of splitmix64 (Steele, Lea, Flood: Fast
splittable pseudorandom number generators, 2014). The sum depends on every word and on its place, and its order does
not matter, so that the threads of a GPU may add in any order. It finds faults. It does not keep out an attacker, who
can choose bytes with an equal sum.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_fp32.transfer.checksum_numpy import numpy_checksum


def write_checksum(payload: Tensor, out: Tensor) -> None:
    """Write the checksum of a buffer. On CUDA the host does not wait.

    Args:
        payload: uint8 [n], contiguous, n a multiple of 8, at an address that is a multiple of 8. On the CPU or CUDA.
        out: uint8 [8] on the same device, at an address that is a multiple of 8. It may lie behind the payload in the
            same memory, and not inside of it.

    Raises:
        TypeError: for another dtype.
        ValueError: for another shape, address or device.
    """
    _check("payload", payload)
    _check_stored("out", out, payload.device)
    if payload.device.type == "cpu":
        out.numpy().view(np.uint64)[0] = numpy_checksum(payload.numpy().view(np.uint64))
        return
    from megatron_fp32.transfer.checksum_kernel import add_checksum

    words = out.view(torch.int64)
    words.zero_()
    add_checksum(payload.view(torch.int64), words)


def checksums_equal(payload: Tensor, stored: Tensor) -> Tensor:
    """Whether a buffer has this checksum. On CUDA the host does not wait.

    Args:
        payload: see `write_checksum`.
        stored: uint8 [8] on the same device, what `write_checksum` has written for the buffer that was sent.

    Returns:
        A bool [] on the buffer's device.

    Raises:
        TypeError: as `write_checksum`.
        ValueError: as `write_checksum`.
    """
    # The comparison below would spread a tensor of another shape or dtype over the bytes, and answer.
    _check_stored("stored", stored, payload.device)
    found = torch.empty(8, dtype=torch.uint8, device=payload.device)
    write_checksum(payload, found)
    return (found == stored).all()


def _check_stored(name: str, tensor: Tensor, device: torch.device) -> None:
    _check(name, tensor)
    if tensor.numel() != 8 or tensor.device != device:
        raise ValueError(f"{name} must have 8 bytes on {device}, got {tensor.numel()} bytes on {tensor.device}")


def _check(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {tensor.dtype}")
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} must be on the CPU or on CUDA, got {tensor.device}")
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.numel() % 8 or tensor.data_ptr() % 8:
        raise ValueError(
            f"{name} must be contiguous, with one dimension and whole 64-bit words, at an address that is a multiple "
            f"of 8, got shape {tuple(tensor.shape)} with strides {tensor.stride()} at the address {tensor.data_ptr()}"
        )
