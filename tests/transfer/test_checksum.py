"""The checksum of a buffer, against its definition in Python's own integers."""

from __future__ import annotations

import functools
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_fp32.transfer.checksum import checksums_equal, write_checksum
from tests.ops.interpreter import names_of, run_in_interpreter
from tests.transfer.checksum_cases import definition

ROOT = Path(__file__).parents[2]
KERNEL = "tests.transfer.checksum_cases"
META = torch.zeros(8, dtype=torch.uint8, device="meta")


def checksum(payload: Tensor) -> int:
    out = torch.full((8,), 255, dtype=torch.uint8)
    write_checksum(payload, out)
    return int.from_bytes(bytes(out), "little")


@pytest.mark.parametrize("size", [0, 8, 16, (1 << 20) - 8, 1 << 20, (1 << 20) + 8, 3 * (1 << 20) + 16])
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


def test_an_empty_buffer_has_the_checksum_0() -> None:
    assert checksum(torch.empty(0, dtype=torch.uint8)) == 0


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 7), (3, 4)])
def test_words_that_change_places_change_the_checksum(first: int, second: int) -> None:
    words = torch.randint(-(2**63), 2**63 - 1, (8,))
    changed = words.clone()
    changed[[first, second]] = words[[second, first]]
    assert checksum(changed.view(torch.uint8)) != checksum(words.view(torch.uint8))


def test_blocks_that_change_places_change_the_checksum() -> None:
    """Blocks of NumPy's path."""
    blocks = torch.randint(0, 256, (2, 1 << 20), dtype=torch.uint8)
    assert checksum(blocks.flip(0).reshape(-1)) != checksum(blocks.reshape(-1))


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


def test_the_trailer_is_written_and_nothing_else() -> None:
    memory = torch.randint(0, 256, (48,), dtype=torch.uint8)
    before = memory.clone()
    write_checksum(memory[:32], memory[32:40])
    assert torch.equal(memory[:32], before[:32])
    assert torch.equal(memory[40:], before[40:])
    assert int.from_bytes(bytes(memory[32:40]), "little") == definition(bytes(before[:32]))


def test_it_makes_no_copy_of_the_buffer() -> None:
    """NumPy tells `tracemalloc` of its memory."""
    payload, out = torch.zeros(32 << 20, dtype=torch.uint8), torch.empty(8, dtype=torch.uint8)
    tracemalloc.start()
    try:
        write_checksum(payload, out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (1 << 20) <= peak < (8 << 20)


@pytest.mark.parametrize(
    ("payload", "out", "error", "message"),
    [
        (torch.zeros(8), torch.zeros(8, dtype=torch.uint8), TypeError, "payload must be uint8, got torch.float32"),
        (torch.zeros(9, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8), ValueError, "whole 64-bit words"),
        (torch.zeros(17, dtype=torch.uint8)[1:], torch.zeros(8, dtype=torch.uint8), ValueError, "at the address"),
        (torch.zeros(16, 2, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8), ValueError, "one dimension"),
        (torch.zeros(32, dtype=torch.uint8)[::2], torch.zeros(8, dtype=torch.uint8), ValueError, "contiguous"),
        (torch.zeros(8, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8), ValueError, "out must have 8 bytes"),
        (torch.zeros(8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), TypeError, "out must be uint8"),
        (torch.zeros(8, dtype=torch.uint8), torch.zeros(9, dtype=torch.uint8)[1:], ValueError, "out must be cont"),
        (torch.zeros(8, dtype=torch.int8), torch.zeros(8, dtype=torch.uint8), TypeError, "got torch.int8"),
        (META, torch.zeros(8, dtype=torch.uint8), ValueError, "payload must be on the CPU or on CUDA, got meta"),
    ],
)
def test_other_buffers_are_refused(payload: Tensor, out: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        write_checksum(payload, out)


@pytest.mark.parametrize(
    ("stored", "error", "message"),
    [
        (torch.zeros(1, dtype=torch.int64), TypeError, "stored must be uint8, got torch.int64"),
        (torch.zeros(1, dtype=torch.uint8), ValueError, "stored must be contiguous"),
        (torch.zeros(2, 8, dtype=torch.uint8), ValueError, "stored must be contiguous, with one dimension"),
        (torch.zeros(0, dtype=torch.uint8), ValueError, "stored must have 8 bytes on cpu, got 0 bytes"),
        (META, ValueError, "stored must be on the CPU or on CUDA, got meta"),
    ],
)
def test_what_is_not_a_checksum_is_refused(stored: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        checksums_equal(torch.zeros(16, dtype=torch.uint8), stored)


def test_the_cpu_needs_neither_triton_nor_megatron() -> None:
    script = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "megatron"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
import torch
from megatron_fp32.transfer.checksum import checksums_equal, write_checksum
payload, out = torch.arange(64, dtype=torch.uint8), torch.empty(8, dtype=torch.uint8)
write_checksum(payload, out)
assert checksums_equal(payload, out)
print(int.from_bytes(bytes(out), "little"))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == definition(bytes(range(64)))


@functools.cache
def outcomes() -> dict[str, str]:
    return run_in_interpreter(KERNEL)


@pytest.mark.parametrize("case", names_of(KERNEL))
def test_the_kernel_in_the_interpreter(case: str) -> None:
    assert not outcomes()[case]
