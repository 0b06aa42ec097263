"""Save, load and resume on two ranks: every optimizer, every format, with and without each repair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.testing.training import TrainerConfig
from tests.distributed import jobs

DISTRIBUTED = TrainerConfig(sharding="dp_reshardable")
RESHARDABLE = TrainerConfig(sharding="fully_reshardable")
FLOAT16 = TrainerConfig(distributed_optimizer=False)


TP2, DP2 = {"tensor": 2}, dict[str, int]()
PP2, VPP2 = {"pipeline": 2}, {"pipeline": 2, "virtual": 2}
BUCKETS = {"bucket_size": 5000, "overlap_grad_reduce": True}

CASES = [
    pytest.param(2, config, parallel, overrides, id=f"{where}-{how}")
    for how, config in (("dp", DISTRIBUTED), ("fully", RESHARDABLE), ("float16", FLOAT16))
    for where, parallel, overrides in (("TP2", TP2, {}), ("TP2-SP", TP2, {"sequence_parallel": True}), ("DP2", DP2, {}))
]
CASES += [
    pytest.param(4, DISTRIBUTED, TP2, {"sequence_parallel": True}, id="TP2-SP-DP2-dp"),
    pytest.param(4, dataclasses.replace(DISTRIBUTED, **BUCKETS), DP2, {}, id="DP4-buckets-dp"),
    pytest.param(2, dataclasses.replace(RESHARDABLE, **BUCKETS), DP2, {}, id="DP2-buckets-fully"),
    pytest.param(2, RESHARDABLE, PP2, {"tied": True}, id="PP2-tied-fully"),
    pytest.param(2, FLOAT16, PP2, {"tied": True}, id="PP2-tied-float16"),
    pytest.param(4, dataclasses.replace(RESHARDABLE, **BUCKETS), VPP2, {"layers": 4}, id="VPP2-DP2-buckets-fully"),
]


@pytest.mark.parametrize(("world", "config", "parallel", "overrides"), CASES)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    ranks: Callable[[int], RankPool],
    tmp_path: Path,
    world: int,
    config: TrainerConfig,
    parallel: jobs.Parallel,
    overrides: dict[str, Any],
) -> None:
    pool = ranks(world)
    whole = pool.run(jobs.straight, config, parallel, 6, overrides)
    pool.run(jobs.train_and_save, config, parallel, 3, tmp_path, None, overrides)
    resumed = pool.run(jobs.resume, config, parallel, 3, tmp_path, None, overrides)
    assert whole[-1][0][-1] < whole[-1][0][0]  # the last pipeline stage has the loss
    for (losses, (parameters, optimizer)), (later, (parameters_2, optimizer_2)) in zip(whole, resumed, strict=True):
        assert later == losses[3:]
        assert parameters_2 == parameters
        assert optimizer_2 == optimizer
        assert any(name.endswith(".step") for name in optimizer)
        assert any(name.endswith(".exp_avg_sq") for name in optimizer)


FAILS_TO_SAVE = [
    ("distributed-index-map", DISTRIBUTED, AssertionError),
    ("distributed-index-map", RESHARDABLE, RuntimeError),
    ("float16-id-map", FLOAT16, AssertionError),
]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("repair", "config", "error"), FAILS_TO_SAVE)
def test_saving_fails_without(tmp_path: Path, repair: str, config: TrainerConfig, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"shape|[Ss]ize"):
        jobs.train_and_save(config, {}, 1, tmp_path, repair, {})


FAILS_TO_LOAD = [
    ("distributed-leaf-shards", DISTRIBUTED, RuntimeError, "leaf Variable that requires grad"),
    ("torch-adam-no-state", DISTRIBUTED, AssertionError, ""),
    ("torch-adam-step-missing", RESHARDABLE, KeyError, "step"),
]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("repair", "config", "error", "message"), FAILS_TO_LOAD)
def test_loading_fails_without(
    tmp_path: Path, repair: str, config: TrainerConfig, error: type[Exception], message: str
) -> None:
    jobs.train_and_save(config, {}, 1, tmp_path, None, {})
    with pytest.raises(error, match=message):
        jobs.resume(config, {}, 1, tmp_path, repair, {})


@pytest.mark.usefixtures("one_rank")
def test_a_shared_step_spoils_a_resumed_run(tmp_path: Path) -> None:
    whole = jobs.straight(RESHARDABLE, {}, 3, {})
    jobs.train_and_save(RESHARDABLE, {}, 1, tmp_path, None, {})
    spoilt = jobs.resume(RESHARDABLE, {}, 2, tmp_path, "torch-adam-shared-step", {})
    steps = [name for name in whole[1][1] if name.endswith(".step")]
    assert steps
    assert all(spoilt[1][1][name] != whole[1][1][name] for name in steps)
