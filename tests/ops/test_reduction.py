"""The sum and the mean of losses, and their gradients, against float64; over ranks with tokens of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import VocabParallel, linear_cross_entropy
from megatron_fp32.ops.logprobs.reduction import Reduction, tree_sum
from megatron_fp32.testing.ranks import RankPool

Pool = Callable[[int], RankPool]
S, B, HIDDEN, VOCAB = 11, 3, 24, 256
FP32 = 1e-6


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    weight = torch.randn(VOCAB, HIDDEN) / 2
    torch.manual_seed(seed)
    hidden, labels = torch.randn(S, B, HIDDEN), torch.randint(VOCAB, (S, B))
    labels[torch.rand(S, B) < 0.2 + 0.2 * seed] = -100
    # What an ignored token holds must reach neither the sum nor a gradient.
    hidden[labels == -100] = torch.nan
    return hidden, weight, labels


def truth(
    hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, count: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The number, dX and dW in float64."""
    x, w = hidden.nan_to_num().double().requires_grad_(), weight.double().requires_grad_()
    z = (x @ w.t()).flatten(0, 1)
    total = torch.nn.functional.cross_entropy(z, labels.flatten(), reduction="sum")
    if reduction == "mean":
        total = total / (int((labels != -100).sum()) if count is None else count)
    return total.detach(), *torch.autograd.grad(total, (x, w))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("backward", ["recompute", "saved"])
def test_against_float64(reduction: Any, backward: Any) -> None:
    hidden, weight, labels = problem()
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = linear_cross_entropy(x, w, labels, reduction=reduction, backward=backward)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    (3 * loss).backward()
    exact, dx, dw = truth(hidden, weight, labels, reduction)
    assert relative_error(loss.detach(), exact) < FP32
    assert relative_error(x.grad, 3 * dx) < 2 * FP32
    assert relative_error(w.grad, 3 * dw) < 2 * FP32
    assert not x.grad[labels == -100].any()


@pytest.mark.parametrize("tokens", [0, 6])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_valid_token(tokens: int, reduction: Any) -> None:
    x, w = torch.full((tokens, 8), torch.nan).requires_grad_(), torch.randn(20, 8).requires_grad_()
    loss = linear_cross_entropy(x, w, torch.full((tokens,), -100), reduction=reduction)
    assert loss == 0
    assert not loss.signbit()
    loss.backward()
    assert not x.grad.any()
    assert not w.grad.any()


def test_a_nan_upstream_gradient_leaves_ignored_tokens_alone() -> None:
    hidden, weight, labels = problem()
    x = hidden.clone().requires_grad_()
    linear_cross_entropy(x, weight, labels, reduction="mean").backward(torch.tensor(torch.nan))
    assert torch.equal(x.grad.isnan().any(-1), labels != -100)
    assert not x.grad[labels == -100].any()


def test_a_nan_token_touches_no_other_gradient() -> None:
    hidden, weight, labels = problem()
    labels[4, 1] = 5
    results = []
    for value in (0.5, torch.nan):
        x = hidden.clone()
        x[4, 1] = value
        x.requires_grad_()
        linear_cross_entropy(x, weight, labels, reduction="mean").backward()
        results.append(x.grad)
    others = torch.ones(S, B, dtype=torch.bool)
    others[4, 1] = False
    assert torch.equal(results[0][others], results[1][others])
    assert results[1][4, 1].isnan().all()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 1025])
def test_the_sum_is_as_good_as_rounding_it_once(count: int) -> None:
    """Large and small numbers: a sum in float32 would lose them."""
    x = torch.rand(20, count) * 10.0 ** torch.randint(-9, 9, (20, count))
    # In float32 it would stay 2^24 + 2 where the sum is 2^24 + 3, and so on.
    x[0], x[0, 0] = 1, 2.0**24
    for each in x:
        found = Reduction(name="sum").of(each, torch.zeros(count, dtype=torch.long), -100)
        assert found == sum(int(v * 2**80) for v in each.double().tolist()) / 2**80
    assert tree_sum(torch.arange(count)) == count * (count - 1) // 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"reduction": None}, ValueError, "reduction must be one of"),
        ({"reduction": "mean", "reduction_group": 2}, TypeError, "reduction_group must be a torch.distributed"),
    ],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    hidden, weight, labels = problem()
    with pytest.raises(error, match=message):
        linear_cross_entropy(hidden, weight, labels, **changes)


def refused(reduction: Any, same: bool) -> str:
    hidden, weight, labels = problem()
    world = dist.group.WORLD
    try:
        linear_cross_entropy(
            hidden, weight, labels, reduction=reduction, reduction_group=world,
            vocab_parallel=VocabParallel(group=world) if same else None,
        )  # fmt: skip
    except ValueError as error:
        return str(error)
    return "no error"


def test_groups_that_count_nothing_or_twice(ranks: Pool) -> None:
    assert all("expected reduction='mean', got 'sum'" in e for e in ranks(2).run(refused, "sum", False))
    assert all("expected reduction='mean', got 'none'" in e for e in ranks(2).run(refused, "none", False))
    assert all("whose ranks have the same tokens" in e for e in ranks(2).run(refused, "mean", True))


def share(tensor_parallel: int, empty: tuple[int, ...]) -> dict[str, Tensor]:
    """This rank's share of the mean, its gradients, and the loss of its tokens; consecutive ranks share tokens."""
    rank, size = dist.get_rank(), dist.get_world_size()
    groups = [list(range(first, first + tensor_parallel)) for first in range(0, size, tensor_parallel)]
    tp_group, _ = dist.new_subgroups_by_enumeration(groups)
    dp_group, _ = dist.new_subgroups_by_enumeration([list(column) for column in zip(*groups, strict=True)])
    replica = rank // tensor_parallel
    hidden, weight, labels = problem(replica)
    if replica in empty:
        labels.fill_(-100)
        hidden.fill_(torch.nan)
    x = hidden.clone().requires_grad_()
    w = weight.chunk(tensor_parallel)[rank % tensor_parallel].clone().requires_grad_()
    loss = linear_cross_entropy(
        x, w, labels, reduction="mean", reduction_group=dp_group, vocab_parallel=VocabParallel(group=tp_group)
    )
    loss.backward()
    summed, total = w.grad.clone(), loss.detach().clone()
    for each in (summed, total):
        dist.all_reduce(each, group=dp_group)
    return {"loss": loss.detach(), "total": total, "dX": x.grad, "dW": summed}


@pytest.mark.parametrize(
    ("size", "tensor_parallel", "empty"),
    [(2, 1, ()), (2, 1, (1,)), (2, 1, (0, 1)), (4, 2, ()), (4, 2, (0,)), (4, 1, (2,))],
    ids=str,
)
def test_the_shares_of_the_mean_over_ranks(
    ranks: Pool, size: int, tensor_parallel: int, empty: tuple[int, ...]
) -> None:
    answers = ranks(size).run(share, tensor_parallel, empty)
    replicas = [problem(i) for i in range(size // tensor_parallel)]
    for i in empty:
        replicas[i][2].fill_(-100)
        replicas[i][0].fill_(torch.nan)
    count = sum(int((labels != -100).sum()) for _, _, labels in replicas)
    exact = [truth(*replica, "mean", max(1, count)) for replica in replicas]
    total, dw = sum(e[0] for e in exact), sum(e[2] for e in exact)
    for rank, answer in enumerate(answers):
        replica = rank // tensor_parallel
        assert relative_error(answer["loss"], exact[replica][0]) < FP32
        assert relative_error(answer["total"], total) < FP32
        assert relative_error(answer["dX"], exact[replica][1]) < 2 * FP32
        assert relative_error(answer["dW"], dw.chunk(tensor_parallel)[rank % tensor_parallel]) < 2 * FP32
        # Ranks with the same tokens agree bit for bit.
        assert torch.equal(answer["loss"], answers[replica * tensor_parallel]["loss"])
