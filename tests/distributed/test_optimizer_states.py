"""Every optimizer state is loaded under its own name, at the layout that saved it and at others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.optimizer_config import ParamKey

from megatron_fp32.config import Fp32Config
from megatron_fp32.testing.ranks import RankError, RankPool
from megatron_fp32.testing.training import TrainerConfig
from tests.distributed import jobs
from tests.distributed.optimizer_states import whole

BUCKETED = TrainerConfig(sharding="fully_reshardable", bucket_size=5000, overlap_grad_reduce=True)
RESHARDABLE = TrainerConfig(sharding="fully_reshardable")
DISTRIBUTED = TrainerConfig(sharding="dp_reshardable")
FLOAT16 = TrainerConfig(distributed_optimizer=False)
TP2, PP2, VPP2 = {"tensor": 2}, {"pipeline": 2}, {"pipeline": 2, "virtual": 2}
EP2 = {"expert": 2}
TIED, FOUR, EXPERTS = {"tied": True}, {"layers": 4}, {"experts": True}
DP: jobs.Parallel = {}


def own_group(*names: str) -> TrainerConfig:
    """Float16Optimizer with a parameter group of its own for each pattern of names."""
    overrides = {ParamKey(name=name): {"wd_mult": 0.5 + i, "max_lr": 1e-4} for i, name in enumerate(names)}
    return dataclasses.replace(FLOAT16, config_overrides=overrides)


LAYOUTS = [
    pytest.param(BUCKETED, 2, DP, 2, DP, {}, id="buckets-DP2-to-DP2"),
    pytest.param(BUCKETED, 2, DP, 4, TP2, {}, id="buckets-DP2-to-TP2-DP2"),
    pytest.param(BUCKETED, 4, TP2, 1, DP, {}, id="buckets-TP2-DP2-to-one"),
    pytest.param(RESHARDABLE, 4, PP2, 2, DP, TIED, id="tied-PP2-DP2-to-DP2"),
    pytest.param(RESHARDABLE, 2, DP, 4, PP2, TIED, id="tied-DP2-to-PP2-DP2"),
    pytest.param(BUCKETED, 4, VPP2, 2, TP2, FOUR, id="buckets-VPP2-DP2-to-TP2"),
    pytest.param(DISTRIBUTED, 4, DP, 2, DP, {}, id="dp_reshardable-DP4-to-DP2"),
    pytest.param(own_group("*.A_log"), 2, DP, 2, TP2, {}, id="own-group-DP2-to-TP2"),
    pytest.param(own_group("*.linear_qkv.weight", "*.A_log"), 2, PP2, 1, DP, FOUR, id="groups-PP2-to-one"),
    pytest.param(own_group("*.out_norm.weight", "*.A_log", "*.bias"), 1, DP, 2, PP2, FOUR, id="three-groups-to-PP2"),
    pytest.param(own_group("*.A_log", "*router*"), 2, EP2, 4, EP2, EXPERTS, id="experts-own-group-EP2-to-EP2-DP2"),
    pytest.param(own_group("*.experts.*", "*.A_log"), 2, EP2, 2, EP2, EXPERTS, id="experts-groups-EP2"),
    pytest.param(BUCKETED, 4, EP2, 2, EP2, EXPERTS, id="experts-buckets-EP2-DP2-to-EP2"),
    pytest.param(own_group("*embedding*", "*.A_log"), 1, DP, 2, PP2, FOUR, id="group-of-one-stage-to-PP2"),
]


@pytest.mark.parametrize(("config", "world", "parallel", "other_world", "other", "overrides"), LAYOUTS)
def test_every_state_has_the_values_of_its_own_name(
    ranks: Callable[[int], RankPool],
    tmp_path: Path,
    config: TrainerConfig,
    world: int,
    parallel: jobs.Parallel,
    other_world: int,
    other: jobs.Parallel,
    overrides: dict[str, Any],
) -> None:
    saved = whole(ranks(world).run(jobs.train_and_save, config, parallel, 2, tmp_path, None, overrides))
    loaded = whole([r[0] for r in ranks(other_world).run(jobs.load_states, config, other, tmp_path, None, overrides)])
    assert any(name.startswith("exp_avg_sq ") and name.endswith("A_log") for name in saved)
    assert loaded.keys() == saved.keys()
    for name, state in saved.items():
        assert torch.equal(loaded[name], state), name


def test_without_its_repair_states_are_shifted(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    repair = "distributed-bucket-padding"
    saved = whole(ranks(2).run(jobs.train_and_save, BUCKETED, DP, 1, tmp_path, repair, {}))
    loaded = whole([r[0] for r in ranks(2).run(jobs.load_states, BUCKETED, DP, tmp_path, repair, {})])
    assert any(not torch.equal(loaded[name], state) for name, state in saved.items())


def test_without_its_repair_parts_of_padding_cannot_be_saved(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    with pytest.raises(RankError, match="empty bucket encountered"):
        ranks(4).run(jobs.train_and_save, DISTRIBUTED, DP, 1, tmp_path, "distributed-empty-part", {})


@pytest.mark.usefixtures("one_rank")
def test_a_file_of_before_the_repair_of_groups_loads(tmp_path: Path) -> None:
    """Without the repair it does not; the file holds every tensor all the same."""
    config, repair = own_group("*.A_log"), "float16-empty-group"
    saved = whole([jobs.train_and_save(config, DP, 1, tmp_path, repair, {})])
    with pytest.raises(ValueError, match="Cannot merge two lists"):
        jobs.load_states(config, DP, tmp_path, repair, {})
    loaded = whole([jobs.load_states(config, DP, tmp_path, None, {})[0]])
    assert all(torch.equal(loaded[name], state) for name, state in saved.items())


@pytest.mark.usefixtures("one_rank")
def test_a_file_of_before_native_masters_loads(tmp_path: Path) -> None:
    saved = whole([jobs.train_and_save(FLOAT16, DP, 1, tmp_path, "float16-native-masters", {})])
    loaded = whole([jobs.load_states(FLOAT16, DP, tmp_path, None, {})[0]])
    assert all(torch.equal(loaded[name], state) for name, state in saved.items())


STOCK = Fp32Config(logits=False, gated_delta_net=())
KEPT = "decoder.layers.0.self_attention.A_log"
EXCHANGED = [
    pytest.param(FLOAT16, FLOAT16, 2, id="float16"),
    pytest.param(RESHARDABLE, RESHARDABLE, 2, id="fully"),
    pytest.param(BUCKETED, BUCKETED, 4, id="fully-buckets-DP4"),
]


@pytest.mark.parametrize(("config", "other", "world"), EXCHANGED)
@pytest.mark.parametrize("to_native", [True, False])
def test_between_16_bit_and_native_fp32(
    ranks: Callable[[int], RankPool],
    tmp_path: Path,
    config: TrainerConfig,
    other: TrainerConfig,
    world: int,
    to_native: bool,
) -> None:
    """No main parameter loses a bit on its way between a run that keeps parameters in fp32 and one that does not."""
    before, after = ({"fp32": STOCK}, {}) if to_native else ({}, {"fp32": STOCK})
    saved = whole(ranks(world).run(jobs.train_and_save, config, DP, 3, tmp_path, None, before))
    answers = ranks(world).run(jobs.load_states, other, DP, tmp_path, None, after)
    loaded = whole([states for states, _ in answers])
    for name, state in saved.items():
        assert torch.equal(loaded[name], state), name
    truth = saved[f"param {KEPT}"]
    assert not torch.equal(truth.bfloat16().float(), truth)
    if to_native:
        for _, native in answers:  # on every rank, the parts of other ranks included
            assert torch.equal(native[KEPT], truth)


@pytest.mark.usefixtures("one_rank")
def test_without_its_repair_a_native_parameter_stays_rounded(tmp_path: Path) -> None:
    saved = whole([jobs.train_and_save(FLOAT16, DP, 3, tmp_path, None, {"fp32": STOCK})])
    _, native = jobs.load_states(FLOAT16, DP, tmp_path, "float16-native-masters", {})
    truth = saved[f"param {KEPT}"]
    assert torch.equal(native[KEPT], truth.bfloat16().float())
    assert not torch.equal(native[KEPT], truth)


REFUSED = [
    (one, other, before, after, message)
    for before, after in (({"fp32": STOCK}, {}), ({}, {"fp32": STOCK}), ({}, {}))
    for one, other, message in (
        (FLOAT16, RESHARDABLE, r"optimizer\.state\.param\."),
        (RESHARDABLE, FLOAT16, r"optimizer\.state\.fp32_param\."),
        (FLOAT16, DISTRIBUTED, r"optimizer\.distributed\."),
        (DISTRIBUTED, RESHARDABLE, r"optimizer\.state\."),
    )
] + [
    (DISTRIBUTED, DISTRIBUTED, {"fp32": STOCK}, {}, "Global shape mismatch"),
    (DISTRIBUTED, DISTRIBUTED, {}, {"fp32": STOCK}, "Global shape mismatch"),
]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(("config", "other", "before", "after", "message"), REFUSED)
def test_formats_that_cannot_be_exchanged_are_refused(
    tmp_path: Path,
    config: TrainerConfig,
    other: TrainerConfig,
    before: dict[str, Any],
    after: dict[str, Any],
    message: str,
) -> None:
    """By megatron-core, which names the first tensor that it misses, never by loading what is not meant."""
    jobs.train_and_save(config, DP, 1, tmp_path, None, before)
    with pytest.raises((CheckpointingException, torch_checkpoint.CheckpointException), match=message):
        jobs.load_states(other, DP, tmp_path, None, after)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("config", [FLOAT16, RESHARDABLE, DISTRIBUTED])
@pytest.mark.parametrize("to_native", [True, False])
def test_the_model_alone_brings_what_the_model_had(tmp_path: Path, config: TrainerConfig, to_native: bool) -> None:
    before, after = ({"fp32": STOCK}, {}) if to_native else ({}, {"fp32": STOCK})
    saved = whole([jobs.train_and_save(config, DP, 3, tmp_path, None, before)])
    loaded = jobs.load_model_alone(config, tmp_path, after)
    rounded = saved[f"param {KEPT}"].bfloat16()
    assert loaded[KEPT].dtype == (torch.float32 if to_native else torch.bfloat16)
    assert torch.equal(loaded[KEPT].bfloat16(), rounded)
    assert torch.equal(loaded[KEPT].float(), rounded.float())
