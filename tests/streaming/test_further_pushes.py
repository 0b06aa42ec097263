"""What a streamer remembers from its first push must not be what it sends at the next one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp32.checkpoint.formats.digests import digest
from megatron_fp32.streaming import VllmWeightSource, WeightStreamer
from megatron_fp32.testing.ranks import RankPool
from tests.checkpoint.layouts import Layout, build, load, on_ranks
from tests.checkpoint.test_parallel_loads import _for_two
from tests.conftest import Families
from tests.families import Case, case

Ranks = Callable[[int], RankPool]


def in_place(parameters: list[torch.nn.Parameter]) -> None:
    """As an optimizer does."""
    for parameter in parameters:
        parameter.mul_(1.25)


def moved(parameters: list[torch.nn.Parameter]) -> None:
    """As offloading does: the storage is another one, and the old one still has the old values."""
    for parameter in parameters[::2]:
        parameter.data = parameter.data * 0.75


def changed_and_pushed(hf: Path, imported: Path, *, layout: Layout, mtp: bool) -> list[Any]:
    """What one streamer and what a new streamer give, after every change."""
    chunks = build(hf, layout, mtp=mtp)
    load(chunks, imported)
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    streamer = WeightStreamer(chunks, source=imported)
    found = [sent(streamer)]
    for change in (in_place, moved, in_place):
        with torch.no_grad():
            change(parameters)
        found += [sent(streamer), sent(WeightStreamer(chunks, source=imported))]
    return found


def described_and_sent(hf: Path, imported: Path, *, layout: Layout, fp8: str | None) -> tuple[list[Any], list[Any]]:
    """What vLLM's sender would announce, and what it would send."""
    chunks = build(hf, layout, mtp=False)
    load(chunks, imported)
    source = VllmWeightSource(WeightStreamer(chunks, source=imported, fp8=fp8))
    assert source.held_names() is None
    announced = [(one.name, one.dtype, one.shape) for one in source.metadata()]
    return announced, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source]


@pytest.mark.parametrize("fp8", [None, "channelwise"])
def test_a_source_for_vllm_announces_what_it_sends(ranks: Ranks, families: Families, fp8: str | None) -> None:
    hf, imported = families(case("Qwen3, tied"))
    sender, other = ranks(2).run(on_ranks, Layout(tensor=2), described_and_sent, hf, imported, fp8=fp8)
    assert sender[0] == sender[1] == other[0]
    assert not other[1]


def sent(streamer: WeightStreamer) -> list[tuple[str, str]]:
    return [(name, digest(tensor)) for name, tensor in streamer]


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        pytest.param(Layout(), case("Qwen3.5-MoE"), id="one rank"),
        pytest.param(Layout(expert=2), _for_two("Qwen3-MoE, fused"), id="EP 2"),
    ],
)
def test_every_push_has_the_values_of_its_moment(ranks: Ranks, families: Families, layout: Layout, model: Case) -> None:
    hf, imported = families(model)
    first, *pairs = ranks(layout.ranks).run(on_ranks, layout, changed_and_pushed, hf, imported, mtp=model.mtp)[0]
    seen = [first]
    for again, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert again == new
        assert again not in seen
        seen.append(again)
