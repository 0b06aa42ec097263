from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from megatron_fp32.testing.cpu import cpu_megatron, model_parallel, single_process
from megatron_fp32.testing.ranks import RankPool
from tests.support import poisoned_memory, rank_setup


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)` is a pool of n ranks with megatron-core on the CPU, started once for the whole run."""
    pools: dict[int, RankPool] = {}

    def of(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size, setup=rank_setup, timeout=240)
        return pools[world_size]

    yield of
    for pool in pools.values():
        pool.close()


@pytest.fixture
def megatron() -> Iterator[None]:
    """megatron-core on the CPU in this process, with a world of one rank."""
    with cpu_megatron(), single_process(), model_parallel():
        yield
