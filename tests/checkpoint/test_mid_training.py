"""Checkpoints as a trainer leaves them in the middle of a run: optimizer, generators and schedulers beside the model.

The state is put together as in Megatron-LM's `generate_state_dict` (megatron/training/checkpointing.py); megatron-core
of this environment writes it, in the style of 0.16 (`common.pt`) or of 0.19 (`common_state`).
"""

from __future__ import annotations

import enum
import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.rerun_state_machine import RerunStateMachine
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_fp32.checkpoint.convert import export_checkpoint
from megatron_fp32.checkpoint.formats.common_state import Opaque, read_common_state
from megatron_fp32.checkpoint.formats.torch_dist import TRACKER, TorchDistReader, known_non_model_entries
from megatron_fp32.models import provider
from megatron_fp32.optimizer import native_fp32
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.testing.training import Batch, Trainer, TrainerConfig
from tests.checkpoint.support import bits, stored_tensors
from tests.conftest import Source
from tests.distributed import jobs
from tests.families import case

FLOAT16 = TrainerConfig(distributed_optimizer=False)
ARGS = Namespace(num_layers=2, params_dtype=torch.bfloat16, attention_backend=AttnBackend.flash, load=Path("/nowhere"))


def _build(hf: Path, config: TrainerConfig) -> Trainer:
    shapes = provider.read_hf_config(hf)
    settings = provider.transformer_config(shapes, **provider.cpu_overrides(), bf16=True, params_dtype=torch.bfloat16)
    model = provider.build_model(shapes, settings, vocab_divisible_by=1)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # as with expert parallelism: they get an optimizer of their own
    return Trainer(model, config)


def _state(trained: Trainer, optimizer: dict[str, Any], tensor: int = 1) -> dict[str, Any]:
    """What Megatron-LM saves."""
    metadata = {**ensure_metadata_has_dp_cp_group({}), **optimizer}
    model = trained.model.sharded_state_dict(metadata=metadata)
    scheduler = OptimizerParamScheduler(
        trained.optimizer, init_lr=0.0, max_lr=1e-3, min_lr=0.0, lr_warmup_steps=1, lr_decay_steps=9,
        lr_decay_style="linear", start_wd=0.01, end_wd=0.01, wd_incr_steps=1, wd_incr_style="constant",
    )  # fmt: skip
    generators = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return {
        "args": ARGS,
        "checkpoint_version": 3.0,
        "iteration": 7,
        "model": model,
        "optimizer": trained.optimizer.sharded_state_dict(model, metadata=metadata),
        "opt_param_scheduler": scheduler.state_dict(),
        "rerun_state_machine": RerunStateMachine().state_dict(None, "torch_dist", force=True),
        "rng_state": ShardedObject("rng_state", [generators], (1, tensor), (0, dist.get_rank())),
    }


def _train_and_save(directory: Path, trained: Trainer, vocab: int, optimizer: dict[str, Any], tensor: int = 1) -> None:
    """One step, then the whole state into `iter_0000007`, and the model alone into `model`."""
    trained.step([Batch.random(vocab, length=jobs.LENGTH)])
    for name in ("iter_0000007", "model"):
        (directory / name).mkdir(exist_ok=True)
    state = _state(trained, optimizer, tensor)
    dist_checkpointing.save(state, str(directory / "iter_0000007"), content_metadata={"flag": True})
    dist_checkpointing.save({"model": _state(trained, optimizer)["model"]}, str(directory / "model"))
    (directory / TRACKER).write_text("7")


def _assert_model_is_found(directory: Path) -> TorchDistReader:
    """All that is in `iter_0000007` and not in `model` is known not to be the model's."""
    reader, alone = TorchDistReader(directory), TorchDistReader(directory / "model")
    others = set(known_non_model_entries([*reader.tensors, *reader.objects]))
    common = set(known_non_model_entries(alone.objects))
    assert {name: info for name, info in reader.tensors.items() if name not in others} == alone.tensors
    assert set(reader.objects) - others == set(alone.objects) - common
    assert others - common
    for name in alone.tensors:
        assert torch.equal(bits(reader.read(name)), bits(alone.read(name))), name
    return reader


SHARDING = {name: {"distrib_optim_sharding_type": name} for name in ("dp_reshardable", "fully_reshardable")}
# A third, fully_sharded_model_space, no longer saves: "flattened_range is not supported".
SHARDING["dp_zero_gather_scatter"] = {"distrib_optim_sharding_type": "dp_zero_gather_scatter"}


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("sharding", [None, *SHARDING])
def test_the_model_is_found_among_the_states_of_its_optimizer(tmp_path: Path, sharding: str | None) -> None:
    with native_fp32.install_optimizer_repairs():
        trained = jobs.trainer(FLOAT16 if sharding is None else TrainerConfig(), tensor=1)
        _train_and_save(tmp_path, trained, 120, SHARDING.get(sharding or "", {}))
    _assert_model_is_found(tmp_path)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("config", "sharding", "start"),
    [
        pytest.param(FLOAT16, "dp_reshardable", "chained_1.optimizer.", id="not distributed"),
        pytest.param(TrainerConfig(), "dp_reshardable", "chained_1.optimizer.", id="dp_reshardable"),
        pytest.param(TrainerConfig(), "fully_reshardable", "optimizer.state.", id="fully_reshardable"),
    ],
)
def test_the_model_is_found_among_the_states_of_two_optimizers(
    tmp_path: Path, config: TrainerConfig, sharding: str, start: str
) -> None:
    hf = case("Qwen3-MoE").write(tmp_path / "hf")
    with native_fp32.install_optimizer_repairs():
        trained = _build(hf, config)
        assert len(trained.optimizer.chained_optimizers) == 2
        _train_and_save(tmp_path, trained, 57, {**SHARDING[sharding], "chained_optim_avoid_prefix": True})
    reader = _assert_model_is_found(tmp_path)
    assert any(name.startswith(start) for name in reader.tensors)


def _train_and_save_in_parallel(directory: Path) -> None:
    with model_parallel(tensor=2), native_fp32.install_optimizer_repairs():
        trained = jobs.trainer(TrainerConfig(), tensor=2)
        _train_and_save(directory, trained, 120, SHARDING["fully_reshardable"], tensor=2)


def test_the_model_is_found_among_the_states_of_two_ranks(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    ranks(2).run(_train_and_save_in_parallel, tmp_path)
    _assert_model_is_found(tmp_path)


def _pickled_as(member: enum.Enum) -> tuple[Any]:
    """The member's value, or its name: Python's releases differ."""
    return (member.__reduce_ex__(2)[1][-1],)


@pytest.mark.usefixtures("megatron")
def test_the_common_state_is_read_without_megatron(tmp_path: Path) -> None:
    with native_fp32.install_optimizer_repairs():
        _train_and_save(tmp_path, jobs.trainer(TrainerConfig(), tensor=1), 120, SHARDING["dp_reshardable"])
    state, common = read_common_state(TorchDistReader(tmp_path)), tmp_path / "iter_0000007" / "common.pt"
    # megatron-core cannot read what Python 3.11.2 makes of an enumeration; this test may unpickle its own file.
    theirs = (
        torch.load(common, weights_only=False)
        if common.is_file()
        else dist_checkpointing.load_common_state_dict(str(common.parent))
    )
    assert state.keys() == theirs.keys()
    backend, mode = state["args"].attention_backend, state["rerun_state_machine"]["mode"]
    assert isinstance(backend, Opaque)
    assert backend.arguments == _pickled_as(AttnBackend.flash)
    assert mode.arguments == _pickled_as(theirs["rerun_state_machine"]["mode"])
    assert (state["args"].num_layers, state["args"].params_dtype) == (2, torch.bfloat16)
    for key in ("checkpoint_version", "iteration", "content_metadata", "opt_param_scheduler", "optimizer"):
        assert state[key] == theirs[key], key


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("style", ["Megatron-LM", "Megatron-Bridge"])
def test_a_checkpoint_from_the_middle_of_training_is_exported(
    source: Source, imported: Source, tmp_path: Path, style: str
) -> None:
    with native_fp32.install_optimizer_repairs():
        trained = _build(source(), TrainerConfig(lr=0.0, weight_decay=0.0))
        trained.load_model(imported() / "release")
        trained.step([Batch.random(57, length=jobs.LENGTH)])
        state = _state(trained, SHARDING["fully_reshardable"])
        checkpoint = tmp_path / "iter_0000007"
        checkpoint.mkdir()
        if style == "Megatron-Bridge":  # after its training/checkpointing.py
            del state["args"]
            (checkpoint / "run_config.yaml").write_text("model: {}\n")
            torch.save({"step": torch.tensor(7)}, checkpoint / "train_state.pt")
            torch.save({"step": torch.tensor(7)}, tmp_path / "latest_train_state.pt")
        dist_checkpointing.save(state, str(checkpoint), content_metadata={})
        (tmp_path / TRACKER).write_text("7")
    export_checkpoint(tmp_path, tmp_path / "hf", source=imported())
    assert stored_tensors(tmp_path / "hf") == stored_tensors(source())
