"""Digests of tensors: what was meant, compared with what is there."""

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
    """XXH3 of dtype, shape and values in 128 bits: equal for tensors that are equal byte for byte.

    It tells damage and change, not malice; a cryptographic one takes longer than everything else in a conversion.
    """
    return digest_of_blocks(tensor.dtype, tensor.shape, [tensor_bytes(tensor)])


def digest_of_blocks(dtype: torch.dtype, shape: Sequence[int], blocks: Iterable[memoryview]) -> str:
    """`digest` of a tensor whose bytes come one block after another."""
    state = xxhash.xxh3_128(f"{DTYPE_NAMES[dtype]} {list(shape)} ".encode())
    for block in blocks:
        state.update(block)
    return state.hexdigest()


def compare(found: str, expected: str, path: Path, name: str) -> None:
    """Raise CheckpointError when the digest of what was read from `path` is not that of what was written there."""
    if found != expected:
        raise CheckpointError(f"{path}: {name!r} reads back other values than were written; the disk may be damaged")


class Digests:
    """Digests of tensors that come whole or, where they are stacks, element by element in any order."""

    def __init__(self) -> None:
        self._parts: dict[str, dict[tuple[int, ...], str]] = {}

    def add(self, name: str, tensor: Tensor, index: tuple[int, ...] = ()) -> str:
        """Take in a tensor, or element `index` of a stack; its digest."""
        value = digest(tensor)
        self._parts.setdefault(name, {})[index] = value
        return value

    def by_name(self) -> dict[str, str]:
        """`digest` of every tensor; of a stack, the XXH3 of its elements' digests one after another."""
        return {
            name: parts[()]
            if () in parts
            else xxhash.xxh3_128_hexdigest("".join(parts[i] for i in sorted(parts)).encode())
            for name, parts in self._parts.items()
        }

    def to_json(self) -> list[Any]:
        """All of them, for `merge` in another process."""
        return [[name, list(index), value] for name, parts in self._parts.items() for index, value in parts.items()]

    def merge(self, content: Sequence[Any]) -> None:
        """Take in what `to_json` made."""
        for name, index, value in content:
            self._parts.setdefault(name, {})[tuple(index)] = value
