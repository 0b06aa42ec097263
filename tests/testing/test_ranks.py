"""`RankPool`: what comes back, and what happens when a rank does not answer."""

from __future__ import annotations

import multiprocessing
import operator
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fp32.testing.ranks import RankError, RankPool


def rank_and(value: Any) -> tuple[int, int, Any]:
    return dist.get_rank(), dist.get_world_size(), value


def summed(tensor: torch.Tensor) -> torch.Tensor:
    mine = tensor * (dist.get_rank() + 1)
    dist.all_reduce(mine)
    return mine


def large(size: int) -> torch.Tensor:
    return torch.full((size,), float(dist.get_rank()))


def pid() -> int:
    return os.getpid()


def raise_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError("what went wrong")
    dist.barrier()  # which the failed rank never enters


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)
    dist.barrier()


def hang() -> None:
    time.sleep(600)


def unpicklable() -> Callable[[], None]:
    return lambda: None


def environment() -> dict[str, str]:
    return {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def grandchild() -> tuple[int, int]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    return os.getpid(), child.pid


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, timeout=60) as pool:
        yield pool


def test_results_are_in_the_order_of_the_ranks(pool: RankPool) -> None:
    assert pool.run(rank_and, {"a": 1}) == [(0, 2, {"a": 1}), (1, 2, {"a": 1})]


def test_ranks_talk_to_each_other(pool: RankPool) -> None:
    for answer in pool.run(summed, tensor=torch.arange(3.0)):
        assert torch.equal(answer, 3 * torch.arange(3.0))


def test_tensors_come_back_by_value_and_outlive_the_ranks(pool: RankPool) -> None:
    answers = pool.run(large, 1 << 18)  # more than a pipe holds
    pool.close()
    for rank, answer in enumerate(answers):
        assert not answer.is_shared()
        assert torch.equal(answer, torch.full((1 << 18,), float(rank)))


def test_the_same_processes_serve_every_run(pool: RankPool) -> None:
    first = pool.run(pid)
    assert len({*first, os.getpid()}) == 3
    assert pool.run(pid) == first


def test_torchruns_variables_are_set(pool: RankPool) -> None:
    assert pool.run(environment) == [{"RANK": r, "WORLD_SIZE": "2", "LOCAL_RANK": r} for r in "01"]


def test_a_traceback_reaches_the_caller_and_the_pool_recovers(pool: RankPool) -> None:
    with pytest.raises(RankError) as error:
        pool.run(raise_on, 1)
    assert "rank 1: Traceback" in str(error.value)
    assert "KeyError: 'what went wrong'" in str(error.value)
    assert "in raise_on" in str(error.value)
    assert pool.run(rank_and, 1) == [(0, 2, 1), (1, 2, 1)]


def test_a_result_that_cannot_be_pickled_is_an_error(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 0: Traceback(.|\n)*pickle"):
        pool.run(unpicklable)


def test_a_rank_that_dies_is_reported(pool: RankPool) -> None:
    with pytest.raises(RankError, match="rank 0: the process died"):
        pool.run(die_on, 0)
    assert pool.run(rank_and, 1) == [(0, 2, 1), (1, 2, 1)]


def test_a_rank_that_dies_between_runs_is_reported(pool: RankPool) -> None:
    os.kill(pool.run(pid)[1], signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(RankError, match="rank 1: the process died"):
        pool.run(rank_and, 1)
    assert pool.run(rank_and, 1) == [(0, 2, 1), (1, 2, 1)]


def test_a_rank_that_hangs_is_ended_with_what_it_started() -> None:
    with RankPool(1, timeout=60) as pool:
        ((rank, child),) = pool.run(grandchild)
        pool._timeout = 0.5  # not from the start: that takes seconds
        with pytest.raises(RankError, match=r"rank 0: no answer within 0\.5 s"):
            pool.run(hang)
        assert not alive(rank)
        assert not alive(child)


def test_closing_leaves_no_process_behind() -> None:
    pool = RankPool(1, timeout=60)
    (rank,) = pool.run(pid)
    assert alive(rank)
    pool.close()
    assert not alive(rank)
    assert not [child for child in multiprocessing.active_children() if child.pid == rank]
    pool.close()  # twice is once


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size must be at least 1, got 0"):
        RankPool(0)


def test_an_interrupted_run_does_not_answer_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with RankPool(1, timeout=60) as pool:
        assert pool.run(operator.add, 1, 1) == [2]
        with monkeypatch.context() as patch:
            patch.setattr(pickle, "loads", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                pool.run(operator.add, 2, 2)
        assert pool.run(operator.add, 3, 3) == [6]


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt
