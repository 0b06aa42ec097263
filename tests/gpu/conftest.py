from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_fp32.checkpoint.convert import import_checkpoint
from megatron_fp32.testing.cpu import model_parallel, single_process
from megatron_fp32.testing.qwen3_5 import write_qwen3_5


@pytest.fixture
def cuda_megatron() -> Iterator[None]:
    """megatron-core on this process's GPU, with a world of one rank."""
    with single_process("nccl"), model_parallel():
        yield


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Hugging Face directory, what an import made of it)."""
    root = tmp_path_factory.mktemp("qwen3_5")
    # FLA's kernels want head dimensions that are powers of two of 16 or more.
    hf = write_qwen3_5(root / "hf", linear_key_head_dim=32, linear_value_head_dim=32)
    import_checkpoint(hf, root / "megatron")
    return hf, root / "megatron"
