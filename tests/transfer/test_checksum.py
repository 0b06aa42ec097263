"""The checksum of a buffer, against its definition in Python's own integers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from megatron_fp32.transfer.checksum import checksums_equal, write_checksum
from tests.ops.interpreter import names_of, run_in_interpreter
from tests.transfer.checksum_cases import definition

KERNEL = "tests.transfer.checksum_cases"


def checksum(payload: Tensor) -> int:
    out = torch.full((8,), 255, dtype=torch.uint8)
    write_checksum(payload, out)
    return int.from_bytes(bytes(out), "little")


@pytest.mark.parametrize("size", [0, 8, 16, 1 << 20, (1 << 20) + 8, 3 * (1 << 20) + 16])
def test_it_equals_its_definition(size: int) -> None:
    payload = torch.randint(0, 256, (size,), dtype=torch.uint8)
    assert checksum(payload) == definition(bytes(payload.numpy()))


def test_every_bit_counts() -> None:
    payload = torch.randint(0, 256, (64,), dtype=torch.uint8)
    whole = checksum(payload)
    for at in range(64):
        for bit in range(8):
            changed = payload.clone()
            changed[at] ^= 1 << bit
            assert checksum(changed) != whole


def test_the_place_of_a_word_counts() -> None:
    payload = torch.randint(0, 256, (64,), dtype=torch.uint8)
    assert checksum(payload.view(8, 8).flip(0).reshape(-1)) != checksum(payload)
    assert checksum(torch.zeros(16, dtype=torch.uint8)) != checksum(torch.zeros(24, dtype=torch.uint8))


def test_a_buffer_is_compared_with_what_was_stored() -> None:
    payload, stored = torch.randint(0, 256, (64,), dtype=torch.uint8), torch.empty(8, dtype=torch.uint8)
    write_checksum(payload, stored)
    assert checksums_equal(payload, stored)
    payload[11] += 1
    assert not checksums_equal(payload, stored)


@pytest.mark.parametrize(
    ("payload", "out", "error", "message"),
    [
        (torch.zeros(8), torch.zeros(8, dtype=torch.uint8), TypeError, "payload must be uint8, got torch.float32"),
        (torch.zeros(9, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8), ValueError, "whole 64-bit words"),
        (torch.zeros(17, dtype=torch.uint8)[1:], torch.zeros(8, dtype=torch.uint8), ValueError, "at the address"),
        (torch.zeros(16, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8), ValueError, "one dimension"),
        (torch.zeros(32, dtype=torch.uint8)[::2], torch.zeros(8, dtype=torch.uint8), ValueError, "contiguous"),
        (torch.zeros(8, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8), ValueError, "out must have 8 bytes"),
    ],
)
def test_other_buffers_are_refused(payload: Tensor, out: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        write_checksum(payload, out)


@functools.cache
def outcomes() -> dict[str, str]:
    return run_in_interpreter(KERNEL)


@pytest.mark.parametrize("case", names_of(KERNEL))
def test_the_kernel_in_the_interpreter(case: str) -> None:
    assert not outcomes()[case]
