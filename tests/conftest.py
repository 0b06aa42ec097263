from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp32.checkpoint.convert import import_checkpoint
from megatron_fp32.testing.cpu import cpu_megatron, model_parallel, single_process
from megatron_fp32.testing.ranks import RankPool
from tests import groups
from tests.families import Case
from tests.qwen3_5 import write_small
from tests.support import poisoned_memory, rank_setup

Source = Callable[..., Path]
Families = Callable[[Case], tuple[Path, Path]]


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


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """`source(**fields)` is a Hugging Face checkpoint, written once for a worker. Do not change it."""
    written: dict[str, Path] = {}

    def of(**fields: Any) -> Path:
        key = repr(sorted(fields.items()))
        if key not in written:
            written[key] = write_small(tmp_path_factory.mktemp("source") / "hf", **fields)
        return written[key]

    return of


@pytest.fixture(scope="session")
def imported(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Source:
    """`imported(**fields)` is what an import made of `source(**fields)`. Do not change it."""
    made: dict[str, Path] = {}

    def of(**fields: Any) -> Path:
        key = repr(sorted(fields.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("imported") / "megatron"
            import_checkpoint(source(**fields), made[key])
        return made[key]

    return of


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """A case's Hugging Face checkpoint and what an import made of it, once for a worker. Do not change them."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(case: Case) -> tuple[Path, Path]:
        if case.name not in made:
            root = tmp_path_factory.mktemp("family")
            hf = case.write(root / "hf")
            import_checkpoint(hf, root / "megatron", vision="carry" if case.outer else "refuse")
            made[case.name] = (hf, root / "megatron")
        return made[case.name]

    return of
