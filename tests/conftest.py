from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import pytest
import torch

from megatron_fp32.testing.cpu import cpu_megatron, model_parallel, single_process
from megatron_fp32.testing.ranks import RankPool
from tests import groups
from tests.support import poisoned_memory, rank_setup


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        groups.group(items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if hasattr(item.config, "workerinput"):
        # xdist puts the group behind the name. Without it the name can be given to pytest again.
        report.nodeid = report.nodeid.removesuffix(f"@{groups.group_of(item)}")
    return report


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
