"""Cases of the checksum's kernel, on whatever device `DEVICE` names: Triton's interpreter, or a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

SIZES = (8, 16, 2048 * 8, 2048 * 8 + 8, 100_008, 3 * 2048 * 8)


MASK = 2**64 - 1


def definition(data: bytes) -> int:
    """As the module's docstring says it."""
    total = 0
    for place in range(len(data) // 8):
        word = int.from_bytes(data[8 * place : 8 * place + 8], "little")
        mixed = (word ^ (place * 0x9E3779B97F4A7C15 & MASK)) * 0xBF58476D1CE4E5B9 & MASK
        mixed ^= mixed >> 29
        mixed = mixed * 0x94D049BB133111EB & MASK
        total += mixed ^ mixed >> 32
    return total & MASK


def equals_its_definition(device: str = "cpu") -> None:
    """Around the edges of blocks."""
    from megatron_fp32.transfer.checksum_kernel import add_checksum

    for size in SIZES:
        payload = torch.randint(0, 256, (size,), dtype=torch.uint8)
        found = torch.zeros(1, dtype=torch.int64, device=device)
        add_checksum(payload.to(device).view(torch.int64), found)
        assert found.item() % 2**64 == definition(bytes(payload)), size


def one_program_takes_many_blocks(device: str = "cpu") -> None:
    """The loop over the blocks of a program."""
    from megatron_fp32.transfer import checksum_kernel

    payload = torch.randint(0, 256, (5 * 2048 * 8 + 24,), dtype=torch.uint8)
    found = torch.zeros(1, dtype=torch.int64, device=device)
    before = checksum_kernel._PROGRAMS
    checksum_kernel._PROGRAMS = 2
    try:
        checksum_kernel.add_checksum(payload.to(device).view(torch.int64), found)
    finally:
        checksum_kernel._PROGRAMS = before
    assert found.item() % 2**64 == definition(bytes(payload))


CASES: dict[str, Callable[[], None]] = {
    function.__name__: function for function in (equals_its_definition, one_program_takes_many_blocks)
}
