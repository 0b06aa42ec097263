"""What `linear_cross_entropy` tells besides the loss: the z-loss of every token, and which labels are most probable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import LogitsTransform, VocabParallel, linear_cross_entropy
from megatron_fp32.testing.ranks import RankPool

Pool = Callable[[int], RankPool]
S, B, HIDDEN, VOCAB, ROWS = 30, 5, 16, 450, 512
PADDED = VocabParallel(vocab_size=VOCAB)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Small integers, whose products are exact: about half of the labels share or have the largest logit."""
    torch.manual_seed(0)
    hidden, weight = torch.randint(-2, 3, (S, B, HIDDEN)).float(), torch.randint(-2, 3, (ROWS, HIDDEN)).float()
    # The same row in several blocks and on several ranks.
    weight[[3, 130, 300, 440]] = weight[77].clone()
    weight[VOCAB:] = torch.nan
    logits = hidden @ weight[:VOCAB].t()
    best = logits.topk(3, dim=-1).indices
    labels = torch.where(torch.rand(S, B) < 0.5, best[..., 0], best[..., 2])
    labels[:8, 0] = torch.tensor([3, 77, 130, 300, 440, 3, 77, 440])
    hidden[:8, 0] = weight[77]
    labels[9, 1], labels[10, 1], labels[11, 1] = -100, VOCAB, -1
    hidden[12, 1] = torch.nan
    return hidden.bfloat16(), weight.bfloat16(), labels


def truth(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ties are correct."""
    logits = hidden.double() @ weight[:VOCAB].double().t()
    known = (labels >= 0) & (labels < VOCAB)
    own = logits.gather(-1, labels.clamp(0, VOCAB - 1)[..., None])[..., 0]
    return known & (own == logits.max(-1).values)  # the maximum of a row with a NaN is NaN


OPTIONS: list[dict[str, Any]] = [
    {},
    {"backward": "saved", "label_smoothing": 0.1, "z_loss": 1e-2},
    {"invariant": True, "chunk_size": 16},
    {"temperature": 0.5, "logits_transform": LogitsTransform(scale=0.5, softcap=64.0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_labels_that_are_the_most_probable_tokens(options: dict[str, Any]) -> None:
    hidden, weight, labels = problem()
    exact = truth(hidden, weight, labels)
    assert 0.3 < exact.float().mean() < 0.8
    out = linear_cross_entropy(hidden, weight, labels, vocab_parallel=PADDED, with_metrics=True, **options)
    assert out.correct.dtype == torch.bool
    assert torch.equal(out.correct, exact)
    assert out.correct[:8, 0].all(), "labels that share the largest logit"
    assert not out.correct[[9, 10, 11, 12], 1].any()


@pytest.mark.parametrize("difference", [1, -1])
def test_a_rival_that_is_next_to_the_label(difference: int) -> None:
    """By one last bit, which no log-prob shows."""
    hidden = torch.ones(1, 1)
    label = torch.tensor(3.0)
    rival = torch.nextafter(label, torch.tensor(10.0 * difference))
    weight = torch.cat([torch.full((300,), 2.9), rival[None], label[None]])[:, None]
    out = linear_cross_entropy(hidden, weight, torch.tensor([301]), with_metrics=True)
    assert out.correct.tolist() == [difference < 0]


def test_an_infinite_logit_is_no_maximum() -> None:
    """Of a row whose loss is NaN nothing is correct."""
    weight = torch.tensor([[1.0], [torch.inf], [2.0]])
    out = linear_cross_entropy(torch.ones(2, 1), weight, torch.tensor([1, 2]), with_metrics=True)
    assert out.loss.isnan().all()
    assert out.correct.tolist() == [False, False]
    only = linear_cross_entropy(torch.ones(1, 1), weight[:1], torch.tensor([0]), with_metrics=True)
    assert only.correct.tolist() == [True]


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_the_loss_and_its_gradients_do_not_change(reduction: Any) -> None:
    hidden, weight, labels = problem()
    hidden[12, 1], labels[10:12, 1] = 1, 5
    results = []
    for with_metrics in (False, True):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out: Any = linear_cross_entropy(
            x, w, labels, vocab_parallel=PADDED, z_loss=0.01, reduction=reduction, with_metrics=with_metrics
        )
        loss = out.loss if with_metrics else out
        loss.sum().backward()
        results.append((loss.detach(), x.grad, w.grad))
        if with_metrics:
            assert not out.z_loss.requires_grad
            assert not out.correct.requires_grad
            exact = 0.01 * (hidden.double() @ weight[:VOCAB].double().t()).logsumexp(-1).square()
            assert relative_error(out.z_loss, torch.where(labels == -100, 0.0, exact)) < 1e-6
            assert out.z_loss[9, 1] == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_without_a_z_loss_its_share_is_0() -> None:
    hidden, weight, labels = problem()
    out = linear_cross_entropy(hidden, weight, labels, vocab_parallel=PADDED, with_metrics=True)
    assert out.z_loss.dtype == torch.float32
    assert not out.z_loss.any()
    assert out.z_loss.shape == labels.shape


def test_an_ignored_label_of_the_vocabulary_is_not_correct() -> None:
    weight = torch.eye(3)
    out = linear_cross_entropy(torch.eye(3), weight, torch.arange(3), ignore_index=1, with_metrics=True)
    assert out.correct.tolist() == [True, False, True]


def test_no_tokens() -> None:
    out = linear_cross_entropy(
        torch.zeros(0, 3, 8), torch.randn(20, 8), torch.zeros(0, 3, dtype=torch.long), with_metrics=True
    )
    assert [tuple(x.shape) for x in out] == [(0, 3)] * 3
    assert out.correct.dtype == torch.bool


def test_another_value_than_a_flag() -> None:
    hidden, weight, labels = problem()
    wrong: Any = 1
    with pytest.raises(TypeError, match="with_metrics must be True or False, got 1"):
        linear_cross_entropy(hidden, weight, labels, with_metrics=wrong)


def on_a_rank(size: int) -> list[Tensor]:
    hidden, weight, labels = problem()
    parallel = VocabParallel(group=dist.group.WORLD, vocab_size=VOCAB)
    found = []
    for options in OPTIONS:
        out = linear_cross_entropy(
            hidden, weight.chunk(size)[dist.get_rank()], labels, vocab_parallel=parallel, with_metrics=True, **options
        )
        found.append(out.correct)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_ties_on_several_ranks(ranks: Pool, size: int) -> None:
    exact = truth(*problem())
    for answer in ranks(size).run(on_a_rank, size):
        assert all(torch.equal(correct, exact) for correct in answer)
