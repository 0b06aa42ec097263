"""Gradients of the kept parameters do not depend on how the model is sharded."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_fp32.config import Fp32Config
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.testing.ranks import RankPool
from tests.distributed import jobs


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_two_ranks_have_the_gradients_of_one(ranks: Callable[[int], RankPool], sequence_parallel: bool) -> None:
    one = ranks(1).run(jobs.gradients, 1, False, Fp32Config())[0]
    assert len(one) == 2
    for two in ranks(2).run(jobs.gradients, 2, sequence_parallel, Fp32Config()):
        for name, truth in one.items():
            parts = two[name] if name.endswith("out_norm.weight") else two[name][None]
            for part in parts:
                # fp32 sums in another order; a sum missing or done twice would be off by far more.
                assert relative_error(part, truth[0] if truth.dim() == 2 else truth) < 1e-4, name


def test_stock_out_norm_sees_only_its_own_heads(ranks: Callable[[int], RankPool]) -> None:
    """The fault (Megatron-LM#7452) that the test above would catch."""
    stock = Fp32Config(gated_delta_net=())
    name = "decoder.layers.0.self_attention.out_norm.weight"
    truth = ranks(1).run(jobs.gradients, 1, False, stock)[0][name][0]
    for two in ranks(2).run(jobs.gradients, 2, False, stock):
        assert relative_error(two[name][0], truth) > 0.1
        assert relative_error(two[name].sum(0), truth) < 1e-4


def test_a_tied_embedding_gets_both_gradients_once(ranks: Callable[[int], RankPool]) -> None:
    stock = ranks(1).run(jobs.tied_embedding_gradient, 1, Fp32Config(logits=False))[0]
    assert relative_error(ranks(1).run(jobs.tied_embedding_gradient, 1, Fp32Config())[0], stock) < 1e-5
    for two in ranks(2).run(jobs.tied_embedding_gradient, 2, Fp32Config()):
        assert relative_error(two, stock) < 1e-4
