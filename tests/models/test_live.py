"""A live model as a source of tensors; every parallel layout is in tests/checkpoint/test_parallel_loads.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module

from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.models.live import LiveTensors, sharded_tensors
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.weights.model_map import map_model
from megatron_fp32.weights.spec import TensorSpec
from tests.checkpoint.layouts import Layout, build, on_ranks
from tests.conftest import Families
from tests.families import case, config_json


@pytest.fixture
def hf(families: Families) -> Path:
    return families(case("Qwen3.5"))[0]


@pytest.fixture
def model(megatron: None, hf: Path) -> GPTModel:
    (chunk,) = build(hf)
    return chunk


class TestOneRank:
    def test_every_parameter_is_read_through_a_view(self, model: GPTModel) -> None:
        storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        assert {entry.data.untyped_storage().data_ptr() for entry in sharded_tensors(model)} == storages
        embedding = LiveTensors(model, group=None).read("embedding.word_embeddings.weight")
        assert embedding.data_ptr() == model.embedding.word_embeddings.weight.data_ptr()

    def test_what_a_step_changes_shows_at_once(self, model: GPTModel) -> None:
        live = LiveTensors(model, group=None)
        name = "decoder.layers.0.self_attention.A_log"
        with torch.no_grad():
            model.decoder.layers[0].self_attention.A_log.add_(1)
        assert torch.equal(live.read(name), model.decoder.layers[0].self_attention.A_log)
        assert live.tensors[name].dtype == live.read(name).dtype == torch.float32

    def test_wrappers_are_looked_through(self, model: GPTModel) -> None:
        wrapped = Float16Module(model.config, model)
        assert LiveTensors([wrapped], group=None).tensors == LiveTensors(model, group=None).tensors

    def test_reading_takes_part_in_no_gradient(self, model: GPTModel) -> None:
        live = LiveTensors(model, group=None)
        assert not any(live.read(name).requires_grad for name in live.tensors)

    def test_a_name_that_is_not_there(self, model: GPTModel) -> None:
        live = LiveTensors(model, group=None)
        assert not live.holds(TensorSpec(name="no.such", shape=(1,)))
        with pytest.raises(KeyError):
            live.read("no.such")


def _rank_alone(hf: Path, *, layout: Layout) -> str:
    chunks = build(hf, layout)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    with pytest.raises(ValueError, match="do not hold every value of the model exactly once") as caught:
        LiveTensors(chunks, group=alone)
    return str(caught.value)


def _replicated_twice(hf: Path, *, layout: Layout) -> list[str]:
    """Of two data-parallel ranks, one gives each value; both read it."""
    chunks = build(hf, layout)
    live = LiveTensors(chunks, group=dist.group.WORLD)
    own = {entry.key: entry.data for entry in sharded_tensors(chunks)}
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.fill_(dist.get_rank() + 1.0)
    return [name for name in own if not bool((live.read(name) == 1.0).all())]


def _of_stage(hf: Path, *, layout: Layout) -> list[str]:
    live = LiveTensors(build(hf, layout), group=dist.group.WORLD)
    shapes = map_model(config_json(hf), _without_mtp(hf))
    return [mapping.megatron[0].name for mapping in shapes.subset(live.holds)]


def _without_mtp(hf: Path) -> list[str]:
    with HuggingFaceReader(hf) as reader:
        return [name for name in reader.tensors if not name.startswith("mtp.")]


class TestRanks:
    def test_a_group_that_lacks_ranks_is_refused(self, ranks: Callable[[int], RankPool], hf: Path) -> None:
        for message in ranks(2).run(on_ranks, Layout(tensor=2), _rank_alone, hf):
            assert "Pass the group of all ranks that hold the model" in message

    def test_of_replicas_the_first_is_read(self, ranks: Callable[[int], RankPool], hf: Path) -> None:
        assert ranks(2).run(on_ranks, Layout(), _replicated_twice, hf) == [[], []]

    def test_a_pipeline_stage_holds_its_own_mappings(self, ranks: Callable[[int], RankPool], hf: Path) -> None:
        stages = Layout(pipeline=2, options=(("num_layers_in_first_pipeline_stage", 1),))
        first, last = ranks(2).run(on_ranks, stages, _of_stage, hf)
        assert first[0] == "embedding.word_embeddings.weight"
        assert "decoder.layers.0.self_attention.A_log" in first
        assert "decoder.layers.0.self_attention.A_log" not in last
        assert last[-1] == "output_layer.weight"
        assert not set(first) & set(last)
