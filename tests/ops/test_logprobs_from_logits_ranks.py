"""`logprobs_from_logits` over two and four ranks, against one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_fp32 import VocabParallel
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs.from_logits import logprobs_from_logits
from megatron_fp32.testing.ranks import RankPool

Pool = Callable[[int], RankPool]
SHAPE, VOCAB, COLUMNS = (4, 6), 390, 440  # on four ranks, the third has some padding and the last one nothing else


def run(ranks: int, dtype: torch.dtype, inplace: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    logits = (torch.randn(*SHAPE, COLUMNS) * 4).to(dtype)
    logits[..., VOCAB:], logits[3, 5] = torch.nan, torch.nan
    labels = torch.randint(VOCAB, SHAPE)
    labels[0, 0], labels[1, 1], labels[2, 2], labels[3, 0] = -100, 0, VOCAB - 1, VOCAB
    upstream = [torch.randn(SHAPE) for _ in range(3)]
    group, rank = (dist.group.WORLD, dist.get_rank()) if ranks > 1 else (None, 0)
    mine = logits.chunk(ranks, -1)[rank].clone().requires_grad_()
    parallel = VocabParallel(group=group, vocab_size=VOCAB)
    # Ranks need not cut the tokens alike.
    out = logprobs_from_logits(
        mine * 1, labels, vocab_parallel=parallel, temperature=0.8, chunk_size=5 + rank, inplace_backward=inplace
    )
    torch.autograd.backward(list(out[:3]), upstream)
    return {"outputs": [x.detach() for x in out[:3]], "grad": mine.grad}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ranks_agree_with_one(ranks: Pool, size: int, dtype: torch.dtype) -> None:
    alone = run(1, dtype, False)
    answers = ranks(size).run(run, size, dtype, size == 4)
    for answer in answers[1:]:
        for a, b in zip(answer["outputs"], answers[0]["outputs"], strict=True):
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    for a, b in zip(answers[0]["outputs"], alone["outputs"], strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert relative_error(a.nan_to_num(7), b.nan_to_num(7)) < 2e-6
    grad = torch.cat([answer["grad"] for answer in answers], -1)
    assert torch.equal(grad.isnan(), alone["grad"].isnan())
    # Few values are on the other side of a rounding boundary.
    bound = 1e-6 if dtype == torch.float32 else 1e-3
    assert relative_error(grad.nan_to_num(7), alone["grad"].nan_to_num(7)) < bound


def uneven(columns: list[int]) -> str:
    logits = torch.randn(3, columns[dist.get_rank()])
    try:
        parallel = VocabParallel(group=dist.group.WORLD)
        logprobs_from_logits(logits, torch.zeros(3, dtype=torch.int64), vocab_parallel=parallel)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("columns", [[151, 150], [76, 76, 76, 73]], ids=str)
def test_ranks_with_different_numbers_of_columns(ranks: Pool, columns: list[int]) -> None:
    for error in ranks(len(columns)).run(uneven, columns):
        assert f"equally many columns on every rank of vocab_parallel.group, got {columns} columns" in error


def poisoned() -> list[bool]:
    """What CUDA does with the answer, which the host does not read there."""
    from unittest import mock

    from megatron_fp32.ops.logprobs import from_logits

    logits, labels = torch.randn(3, 20), torch.tensor([0, -100, 2])
    with mock.patch.object(from_logits, "columns_are_even", return_value=torch.tensor(False)):
        out = logprobs_from_logits(logits, labels, vocab_parallel=VocabParallel(group=dist.group.WORLD))
    return out.logprobs.isnan().tolist()


def test_results_of_uneven_ranks_are_nan_where_nobody_waits(ranks: Pool) -> None:
    assert ranks(2).run(poisoned) == [[True, False, True]] * 2
