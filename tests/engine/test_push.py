"""A live Megatron model on four ranks, pushed into a real vLLM: equal to a fresh load of what was saved and exported.

Two engines start at a time, one with the old and one with the new weights. Each is the witness of a fresh load for what
is pushed into the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_fp32.streaming import VllmOptions
from megatron_fp32.testing.ranks import RankPool
from tests.checkpoint.layouts import Layout, on_ranks
from tests.engine.server import BLOCK_FP8, VISIBLE_WEIGHTS, EngineServer
from tests.engine.test_loads import engine_case
from tests.engine.trainers import (
    FLAGS,
    OPTIONS,
    TP2_PP2,
    Files,
    make_files,
    push_both_ways,
    push_not_finite,
    state,
)
from tests.families import Case

pytestmark = pytest.mark.engine

Ranks = Callable[[int], RankPool]

EXPERTS = Layout(tensor=2, pipeline=2, expert=2, expert_tensor=1)


def small(name: str) -> Case:
    """A case with a layer for each stage of a pipeline."""
    chosen = engine_case(name)
    layers: dict[str, Any] = {"num_hidden_layers": 2}
    if "layer_types" in chosen.fields:
        layers["layer_types"] = ["linear_attention", "full_attention"]
    if "num_experts" in chosen.fields:
        layers["num_experts"] = 4  # two on each expert-parallel rank
    return dataclasses.replace(chosen, fields={**chosen.fields, **layers}, mtp=False)


@contextlib.contextmanager
def engines(directories: Sequence[Path], environments: Sequence[dict[str, str]] = (), **kwargs: Any) -> Iterator[Any]:
    """Engines that start together, because a start waits for one core."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        settings = [*environments, *[{}] * (len(directories) - len(environments))]
        servers = [
            EngineServer(directory, flags=FLAGS, environment=environment, **kwargs)
            for directory, environment in zip(directories, settings, strict=True)
        ]
        for started in [pool.submit(server.__enter__) for server in servers]:
            stack.push(started.result().__exit__)
        yield servers


def check_both_ways(
    ranks: Ranks,
    files: Files,
    old: EngineServer,
    new: EngineServer,
    *,
    layout: Layout = TP2_PP2,
    fp8: str | None = None,
    options: VllmOptions = OPTIONS,
    token: str | None = None,
) -> list[Any]:
    """Push into both engines, and compare each one with what the other one was when it was fresh."""
    fresh_old, fresh_new = state(old), state(new)
    assert fresh_old[1] != fresh_new[1]
    receipts = ranks(layout.ranks).run(
        on_ranks, layout, push_both_ways, files, old.url, new.url, fp8=fp8, options=options, token=token
    )
    assert state(old) == fresh_new
    assert state(new) == fresh_old
    assert [old.weight_info(), new.weight_info()] == [{"weight_version": "8"}, {"weight_version": "6"}]
    sent: list[Any] = receipts[0]
    assert [receipt.failed for receipt in sent] == [{}] * 3
    assert [engine.engine for receipt in sent for engine in receipt.engines] == [new.url, old.url, old.url]
    assert {len(engine.workers) for receipt in sent for engine in receipt.engines} == {old.tensor_parallel}
    return sent


def test_tied_experts_in_an_engine_of_two_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """vLLM packs experts on a CPU, which the checksums do not see: the log-probs tell whether it has done so again."""
    made = small("Qwen3-MoE, plain probabilities, tied")
    files = make_files(tmp_path, made, ranks, layout=EXPERTS)
    with engines([files.old, files.new], tensor_parallel=2) as (old, new):
        check_both_ways(ranks, files, old, new, layout=EXPERTS)


def test_a_gated_norm_that_was_trained_in_fp32_in_float8(ranks: Ranks, tmp_path: Path) -> None:
    files = make_files(tmp_path, small("Qwen3.5"), ranks, fp8="channelwise")
    norm = "model.layers.0.linear_attn.norm.weight"
    trained = load_file(next(files.new.glob("*.safetensors")))[norm]
    assert trained.dtype == torch.float32
    assert not torch.equal(trained, trained.bfloat16().float())
    environments: list[dict[str, str]] = [{}, {}, {"MEGATRON_FP32_KEEP_NORM": "0"}]
    with engines([files.old, files.new, files.old], environments) as (old, new, rounding):
        fresh_new = state(new)
        sent = check_both_ways(ranks, files, old, new, fp8="like:engine")
        assert [receipt.engines[0].rounded for receipt in sent] == [()] * 3

        push = (push_both_ways, files, rounding.url, rounding.url)
        receipts = ranks(4).run(on_ranks, TP2_PP2, *push, fp8="like:engine", options=OPTIONS)[0]
        assert [receipt.engines[0].rounded for receipt in receipts] == [(norm,)] * 3

        errors = ranks(4).run(on_ranks, TP2_PP2, push_not_finite, files, old.url)
        assert all("layers.1.mlp.down_proj.weight" in error for error in errors), errors
        assert (old.get("/is_paused"), old.weight_info()["weight_version"]) == ({"is_paused": True}, "incomplete")
        push = (push_both_ways, files, old.url, new.url)
        ranks(4).run(on_ranks, TP2_PP2, *push, fp8="like:engine", options=OPTIONS)
        assert state(old) == fresh_new


def test_blocks_of_float8(ranks: Ranks, tmp_path: Path) -> None:
    files = make_files(tmp_path, small("Qwen3, tied"), ranks, fp8="blockwise")
    with engines([files.old, files.new], plugins=[VISIBLE_WEIGHTS, BLOCK_FP8]) as (old, new):
        check_both_ways(ranks, files, old, new, fp8="like:engine")
