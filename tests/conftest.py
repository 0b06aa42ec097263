from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megatron_fp32.testing.cpu import cpu_megatron, model_parallel, single_process
from megatron_fp32.testing.ranks import RankPool
from tests import groups
from tests.support import poisoned_memory, rank_setup


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, tests go to the workers in the groups of tests/groups.py."""
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return groups.group_of(nodeid)

    config.option.loadscopereorder = False  # groups begin in the order of their tests
    return Groups(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: groups.place_of(item.nodeid))


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    torch.manual_seed(0)
    with poisoned_memory():
        yield


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)` is a pool of n ranks with megatron-core on the CPU, started once for the whole run, in one worker."""
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
