"""Digests of tensors, for comparing written bytes with the bytes on the disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from megatron_fp32.checkpoint.formats.huggingface import tensor_bytes
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import DTYPE_NAMES


def digest(tensor: Tensor) -> str:
    """XXH3-128 of dtype, shape and values, equal for tensors that are equal byte for byte.

    It detects damage and changes, but not a forged tensor. A cryptographic digest would take longer than all other work
    of a conversion.
    """
    return digest_of_blocks(tensor.dtype, tensor.shape, [tensor_bytes(tensor)])


def digest_of_blocks(dtype: torch.dtype, shape: Sequence[int], blocks: Iterable[memoryview]) -> str:
    """`digest` of a tensor whose bytes are given block by block."""
    state = xxhash.xxh3_128(f"{DTYPE_NAMES[dtype]} {list(shape)} ".encode())
    for block in blocks:
        state.update(block)
    return state.hexdigest()


def compare(found: str, expected: str, path: Path, name: str) -> None:
    """Raise CheckpointError if a tensor that was read back from `path` has another digest than the written tensor."""
    if found != expected:
        raise CheckpointError(
            f"{path}: {name!r} has other values on the disk than were written; the disk may be damaged"
        )


class Digests:
    """Collects digests of whole tensors, and of elements of stacks in any order."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[tuple[int, ...], str]] = {}

    def add(self, name: str, tensor: Tensor, index: tuple[int, ...] = ()) -> str:
        """Add a tensor, or element `index` of a stack, and return its digest."""
        value = digest(tensor)
        self._parts.setdefault(name, {})[index] = value
        return value

    def by_name(self) -> dict[str, str]:
        """The digest of every tensor. The digest of a stack is the XXH3 of its elements' digests in order."""
        return {
            name: parts[()]
            if () in parts
            else xxhash.xxh3_128_hexdigest("".join(parts[i] for i in sorted(parts)).encode())
            for name, parts in self._parts.items()
        }

    def to_json(self) -> list[Any]:
        """All digests, for `merge` in another process."""
        return [[name, list(index), value] for name, parts in self._parts.items() for index, value in parts.items()]

    def merge(self, content: Sequence[Any]) -> None:
        """Add digests that `to_json` returned."""
        for name, index, value in content:
            self._parts.setdefault(name, {})[tuple(index)] = value
