"""The checksum of buffers on a GPU."""

from __future__ import annotations

import pytest
import torch

from megatron_fp32.transfer.checksum import checksums_equal, write_checksum
from tests.transfer import checksum_cases

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", checksum_cases.CASES)
def test_the_kernel(case: str) -> None:
    getattr(checksum_cases, case)("cuda")


@pytest.mark.parametrize("size", [0, 8, 4096 + 8, (1 << 31) + (1 << 20) + 8])
def test_the_gpu_and_the_cpu_agree(size: int) -> None:
    payload = torch.randint(0, 256, (size,), dtype=torch.uint8, device="cuda")
    here, there = torch.empty(8, dtype=torch.uint8, device="cuda"), torch.empty(8, dtype=torch.uint8)
    write_checksum(payload, here)
    write_checksum(payload.cpu(), there)
    assert torch.equal(here.cpu(), there)
    assert checksums_equal(payload, here)
    if size:
        payload[size - 1] ^= 1
        assert not checksums_equal(payload, here)


def test_the_host_does_not_wait() -> None:
    memory = torch.randint(0, 256, ((1 << 20) + 8,), dtype=torch.uint8, device="cuda")
    payload, trailer = memory[:-8], memory[-8:]
    write_checksum(payload, trailer)  # compiles
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        write_checksum(payload, trailer)
        equal = checksums_equal(payload, trailer)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert equal.device == payload.device
    assert equal


def test_a_checksum_on_another_device_is_refused() -> None:
    payload, stored = torch.zeros(16, dtype=torch.uint8, device="cuda"), torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="out must have 8 bytes on cuda:0, got 8 bytes on cpu"):
        write_checksum(payload, stored)
    with pytest.raises(ValueError, match="stored must have 8 bytes on cuda:0, got 8 bytes on cpu"):
        checksums_equal(payload, stored)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_buffer_on_another_gpu() -> None:
    payload = torch.randint(0, 256, (100_008,), dtype=torch.uint8)
    there = torch.empty(8, dtype=torch.uint8, device="cuda:1")
    write_checksum(payload.to("cuda:1"), there)
    assert int.from_bytes(bytes(there.cpu()), "little") == checksum_cases.definition(bytes(payload))
