"""A token of the vocabulary as `ignore_index`, over ranks, against -100 on one rank and against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import VocabParallel, linear_cross_entropy, linear_logprobs, weighted_cross_entropy
from megatron_fp32.testing.ranks import RankPool

Pool = Callable[[int], RankPool]
TOKENS, HIDDEN, VOCAB, ROWS = 40, 32, 450, 512
INDICES = (0, 200, VOCAB - 1)


def problem(index: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN).bfloat16(), (torch.randn(ROWS, HIDDEN) / 4).bfloat16()
    weight[VOCAB:] = torch.nan
    # The ignored token of the vocabulary is the most probable one of some tokens.
    weight[index] *= 4
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[labels == index] = 7
    labels[::5] = index
    hidden[0] = torch.nan
    return hidden, weight, labels, torch.rand(TOKENS)


def results(ranks: int, index: int, ignore_index: int) -> list[list[Tensor]]:
    """Outputs, dX and dW of this rank, for every operator."""
    hidden, weight, labels, g = problem(index)
    labels = torch.where(labels == index, ignore_index, labels)
    rank, group = (dist.get_rank(), dist.group.WORLD) if ranks > 1 else (0, None)
    options: dict[str, Any] = {
        "vocab_parallel": VocabParallel(group=group, vocab_size=VOCAB), "ignore_index": ignore_index, "invariant": True
    }  # fmt: skip
    found = []
    for operator in ("logprobs", "loss", "weighted"):
        x, w = hidden.clone().requires_grad_(), weight.chunk(ranks)[rank].clone().requires_grad_()
        if operator == "logprobs":
            out = linear_logprobs(x, w, labels, top_k=3, **options)
            (out.logprobs * g + out.entropy).sum().backward()
            values = [t.detach() for t in out if t is not None]
        elif operator == "loss":
            loss = linear_cross_entropy(x, w, labels, label_smoothing=0.1, z_loss=1e-3, reduction="mean", **options)
            loss.backward()
            values = [loss.detach()]
        else:
            weighted = weighted_cross_entropy(x, w, labels, g, **options)
            weighted.total.backward()
            values = [weighted.losses]
        found.append([*values, x.grad, w.grad])
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree_with_one_whose_labels_are_minus_100(ranks: Pool, size: int) -> None:
    for index in INDICES:
        alone = results(1, index, -100)
        answers = ranks(size).run(results, size, index, index)
        for operator, expected in enumerate(alone):
            for answer in answers:
                assert all(torch.equal(a, b) for a, b in zip(answer[operator][:-1], expected[:-1], strict=True))
            dw = torch.cat([answer[operator][-1] for answer in answers])
            assert relative_error(dw, expected[-1].double()) < 1e-3


@pytest.mark.parametrize("index", INDICES)
def test_against_float64(index: int) -> None:
    hidden, weight, labels, _ = problem(index)
    x, w = hidden.float().nan_to_num().requires_grad_(), weight.float().requires_grad_()
    padded = VocabParallel(vocab_size=VOCAB)
    loss = linear_cross_entropy(x, w, labels, reduction="mean", ignore_index=index, vocab_parallel=padded)
    loss.backward()
    a, b = x.detach().double().requires_grad_(), w.detach()[:VOCAB].double().requires_grad_()
    exact = torch.nn.functional.cross_entropy(a @ b.t(), labels, ignore_index=index)
    exact.backward()
    assert relative_error(loss.detach(), exact.detach()) < 1e-6
    assert relative_error(x.grad, a.grad) < 2e-6
    assert relative_error(w.grad[:VOCAB], b.grad) < 2e-6
    assert w.grad[index].abs().max() > 1e-4, "the ignored token of the vocabulary has a gradient like any other"


def test_minus_100_is_a_label_like_any_other_outside_of_the_vocabulary() -> None:
    hidden, weight, labels, _ = problem(0)
    labels[3] = -100
    losses = linear_cross_entropy(
        hidden, weight, labels, ignore_index=0, vocab_parallel=VocabParallel(vocab_size=VOCAB)
    )
    assert losses.isnan().nonzero().tolist() == [[3]]
