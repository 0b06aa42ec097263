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
