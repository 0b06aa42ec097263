"""Gradients of the kept parameters over two tensor-parallel ranks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from torch import Tensor

from megatron_fp32.gated_delta_net.layer import Fp32GatedDeltaNet
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.testing.cpu import cpu_megatron, model_parallel, single_process
from megatron_fp32.testing.ranks import RankPool
from tests.gated_delta_net.layers import MODEL, build, load, random_weights, shard

RANKS = 2
SHAPE = (8, 2, MODEL.hidden_size)

Pool = Callable[[int], RankPool]
Gradients = dict[str, Tensor]


def gradients(
    tensor: int, sequence_parallel: bool, stock: bool, hidden: Tensor, cotangent: Tensor, prepare: str = ""
) -> Gradients:
    """On one rank: gradients of the fp32 layer with this rank's heads, as the optimizer would see them.

    `prepare` is what happens to the layer between construction and the pass that counts.
    """
    with model_parallel(tensor=tensor):
        rank = dist.get_rank()
        layer: Any = build(
            GatedDeltaNet if stock else Fp32GatedDeltaNet,
            params_dtype=torch.float32,
            config={"tensor_model_parallel_size": tensor, "sequence_parallel": sequence_parallel},
        )
        load(layer, shard(random_weights(), rank, tensor))
        if sequence_parallel:
            hidden, cotangent = hidden.chunk(tensor)[rank], cotangent.chunk(tensor)[rank]

        def backward() -> None:
            layer(hidden, None)[0].backward(cotangent)

        if prepare == "forward twice":
            with torch.no_grad():
                layer(hidden, None)
            backward()
        elif prepare == "copy":
            layer = copy.deepcopy(layer)
        elif prepare == "forward, copy":
            backward()
            layer = copy.deepcopy(layer)
        elif prepare == "forward, new parameters":
            backward()
            values = {name: p.detach().clone() for name, p in layer.named_parameters()}
            layer.to_empty(device="meta").to_empty(device="cpu")
            load(layer, values)
        elif prepare == "frozen at first":
            layer.requires_grad_(False)
            layer(hidden, None)
            layer.requires_grad_(True)
        layer.zero_grad()
        backward()

        found = {name: p.grad for name, p in layer.named_parameters()}
        # What finalize_model_grads does with sequence parallel.
        if sequence_parallel:
            for name, parameter in layer.named_parameters():
                if getattr(parameter, "sequence_parallel", False):
                    dist.all_reduce(found[name])
        return found


@pytest.fixture
def problem() -> tuple[Tensor, Tensor]:
    return torch.randn(SHAPE), torch.randn(SHAPE)


@pytest.fixture
def one_rank(problem: tuple[Tensor, Tensor]) -> tuple[Gradients, dict[str, float]]:
    """Gradients at TP=1, and how much they move when the sum over the batch is taken in another order."""
    with cpu_megatron(), single_process():
        together = gradients(1, False, False, *problem)
        parts = [gradients(1, False, False, *(t[:, i : i + 1] for t in problem)) for i in range(SHAPE[1])]
    noise = {name: relative_error(sum(part[name] for part in parts), grad) for name, grad in together.items()}
    return together, noise


def assert_close(actual: Tensor, name: str, one_rank: tuple[Gradients, dict[str, float]]) -> None:
    expected, noise = one_rank
    assert relative_error(actual, expected[name]) <= 4 * max(noise.values()), name


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2+sp"])
@pytest.mark.parametrize(
    "prepare", ["", "copy", "forward twice", "forward, copy", "forward, new parameters", "frozen at first"]
)
def test_gradients_are_those_of_one_rank(
    ranks: Pool, problem: Any, one_rank: Any, sequence_parallel: bool, prepare: str
) -> None:
    answers = ranks(RANKS).run(gradients, RANKS, sequence_parallel, False, *problem, prepare=prepare)
    for answer in answers:
        assert_close(answer["out_norm.weight"], "out_norm.weight", one_rank)
    assert torch.equal(answers[0]["out_norm.weight"], answers[1]["out_norm.weight"])
    for name in ("A_log", "dt_bias"):
        assert_close(torch.cat([answer[name] for answer in answers]), name, one_rank)


def test_the_stock_layers_out_norm_gradient_is_wrong_without_sequence_parallel(
    ranks: Pool, problem: Any, one_rank: Any
) -> None:
    """So the test above can fail. Megatron-LM#7452; when this one fails, the hook is no longer needed."""
    expected, _ = one_rank
    answers = ranks(RANKS).run(gradients, RANKS, False, True, *problem)
    parts = [answer["out_norm.weight"] for answer in answers]
    assert all(relative_error(part, expected["out_norm.weight"]) > 0.1 for part in parts)
    assert_close(sum(parts), "out_norm.weight", one_rank)


def test_the_stock_layers_out_norm_gradient_is_right_with_sequence_parallel(
    ranks: Pool, problem: Any, one_rank: Any
) -> None:
    """So a hook there would count it twice."""
    for answer in ranks(RANKS).run(gradients, RANKS, True, True, *problem):
        assert_close(answer["out_norm.weight"], "out_norm.weight", one_rank)
