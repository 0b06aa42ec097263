"""On which GPUs the kernels run that bring tiles through the tensor memory accelerator."""

from __future__ import annotations

import torch

SHARED_MEMORY = {9: 214_016, 10: 278_576, 12: 165_904}
"""Bytes that the largest of these kernels takes for one block, by the major number of the compute capability, which
decides how Triton lays out a tile. `tests/ops/test_compiled_kernels.py` compiles the kernels and compares."""


def why_not_tiles(device: torch.device) -> str | None:
    """Why a GPU cannot run these kernels; None when it can.

    Hopper offers 232448 bytes of shared memory to a block, a data-center Blackwell (10.0) as many but needs more, and a
    consumer Blackwell (12.0) has 101376. A library multiplies there.
    """
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return "it needs a GPU of compute capability 9.0 or newer"
    if major not in SHARED_MEMORY:
        return f"its kernels are not known to run on compute capability {major}.{minor}"
    offered = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if offered < SHARED_MEMORY[major]:
        return (
            f"on compute capability {major}.{minor} it needs {SHARED_MEMORY[major]} bytes of shared memory for a "
            f"block, and the GPU offers {offered}"
        )
    return None
