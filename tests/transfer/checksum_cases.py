"""Cases of the checksum's kernel: on the CPU in Triton's interpreter, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch

SIZES = (8, 16, 2048 * 8 - 8, 2048 * 8, 2048 * 8 + 8, 100_008, 3 * 2048 * 8)
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
    with mock.patch.object(checksum_kernel, "_PROGRAMS", 2):
        checksum_kernel.add_checksum(payload.to(device).view(torch.int64), found)
    assert found.item() % 2**64 == definition(bytes(payload))


def equals_numpy(device: str = "cpu") -> None:
    """Larger than a block of NumPy's, and from an address that is no multiple of 16."""
    from megatron_fp32.transfer.checksum import write_checksum
    from megatron_fp32.transfer.checksum_kernel import add_checksum

    memory = torch.randint(0, 256, ((1 << 20) + 24,), dtype=torch.uint8)
    expected = torch.empty(8, dtype=torch.uint8)
    write_checksum(memory[8:], expected)
    found = torch.zeros(1, dtype=torch.int64, device=device)
    add_checksum(memory.to(device)[8:].view(torch.int64), found)
    assert found.item() == expected.view(torch.int64).item()


def the_trailer_is_written_and_nothing_else(device: str = "cpu") -> None:
    """As the sender writes it: into the buffer, behind the payload."""
    from megatron_fp32.transfer.checksum_kernel import add_checksum

    memory = torch.full((48,), 0x7F, dtype=torch.uint8, device=device)
    trailer = memory[32:40].view(torch.int64).zero_()
    add_checksum(memory[:32].view(torch.int64), trailer)
    assert trailer.item() % 2**64 == definition(b"\x7f" * 32)
    assert bytes(memory[:32].cpu()) == b"\x7f" * 32
    assert bytes(memory[40:].cpu()) == b"\x7f" * 8


CASES: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        equals_its_definition,
        one_program_takes_many_blocks,
        equals_numpy,
        the_trailer_is_written_and_nothing_else,
    )
}
