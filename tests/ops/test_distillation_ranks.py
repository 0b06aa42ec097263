"""`linear_distillation` over two and four ranks, against one rank and against float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import LogitsTransform, VocabParallel
from megatron_fp32.ops.logprobs.distillation import Distillation, linear_distillation
from megatron_fp32.testing.ranks import RankPool
from tests.ops.distillation_cases import DIVERGENCES, Case
from tests.ops.logprobs_cases import with_main_grad

Pool = Callable[[int], RankPool]
TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB, ROWS = (16, 4), 96, 40, 380, 512  # the last of four ranks has padding alone
LAYOUTS = pytest.mark.parametrize(
    ("size", "sequence_parallel"),
    [(2, False), (2, True), (4, False), (4, True)],
    ids=["tp2", "tp2+sp", "tp4", "tp4+sp"],
)
MASKED = (0, 1)


def problem(dtype: torch.dtype, close: bool) -> dict[str, Tensor]:
    """NaN in the padding, and in all that belongs to a token that does not count."""
    torch.manual_seed(0)
    hidden = (torch.randn(*TOKENS, HIDDEN) * 3).to(dtype)
    weight = (torch.randn(ROWS, HIDDEN) / HIDDEN**0.5).to(dtype)
    teacher_hidden = hidden + (torch.randn(*TOKENS, HIDDEN) / 16).to(dtype)
    teacher_weight = weight.clone()
    if not close:
        teacher_hidden = (torch.randn(*TOKENS, TEACHER_HIDDEN) * 3).to(dtype)
        teacher_weight = (torch.randn(ROWS, TEACHER_HIDDEN) / TEACHER_HIDDEN**0.5).to(dtype)
    labels = torch.randint(VOCAB, TOKENS)
    labels[1, 1], labels[2, 2] = 0, VOCAB - 1
    weight[VOCAB:] = teacher_weight[VOCAB:] = math.nan
    upstream = torch.randn(2, *TOKENS)
    hidden[MASKED], teacher_hidden[MASKED], upstream[:, *MASKED] = math.nan, math.nan, math.nan
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[MASKED] = False
    return {
        "hidden": hidden, "weight": weight, "teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight,
        "labels": labels, "upstream": upstream, "mask": mask,
    }  # fmt: skip


def head(ranks: int, sequence_parallel: bool, dtype: torch.dtype, close: bool, options: dict[str, Any]) -> list[Any]:
    """On one rank: outputs, this rank's dX and dW."""
    p, rank = problem(dtype, close), dist.get_rank() if ranks > 1 else 0
    tokens = slice(None)
    if sequence_parallel:
        tokens = slice(rank * TOKENS[0] // ranks, (rank + 1) * TOKENS[0] // ranks)
    hidden = p["hidden"][tokens].clone().requires_grad_()
    weight = with_main_grad(p["weight"].chunk(ranks)[rank].clone().requires_grad_())
    parallel = VocabParallel(
        group=dist.group.WORLD if ranks > 1 else None, sequence_parallel=sequence_parallel, vocab_size=VOCAB
    )
    options = dict(options)
    with_labels = options.pop("with_labels", True)
    out = linear_distillation(
        hidden, weight, p["teacher_hidden"][tokens], p["teacher_weight"].chunk(ranks)[rank],
        labels=p["labels"] if with_labels else None, mask=p["mask"], vocab_parallel=parallel, **options,
    )  # fmt: skip
    torch.autograd.backward([x for x in out[:2] if x is not None], list(p["upstream"][: 1 + with_labels]))
    return [[x.detach() for x in out if x is not None], hidden.grad, weight.main_grad]


def whole(answers: list[list[Any]], sequence_parallel: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Ranks agree bit for bit."""
    for outputs, dx, _ in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs, answers[0][0], strict=True))
        assert sequence_parallel or torch.equal(dx, answers[0][1])
    dx = torch.cat([a[1] for a in answers]) if sequence_parallel else answers[0][1]
    return answers[0][0], dx, torch.cat([a[2] for a in answers])


@LAYOUTS
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("forward", {"with_labels": False}),
        ("reverse", {"chunk_size": 24}),
        ("jsd of 0.9", {"label_temperature": 0.7}),
        ("all", {"temperature": 2.0, "logits_transform": LogitsTransform(softcap=20.0)}),
    ],
    ids=["forward", "reverse", "jsd", "all"],
)
def test_ranks_against_one(ranks: Pool, size: int, sequence_parallel: bool, name: str, options: dict[str, Any]) -> None:
    options = {"divergence": DIVERGENCES[name], "grad_precision": "bf16x3", **options}
    for dtype, bound in ((torch.float32, 3e-6), (torch.bfloat16, 1e-3)):
        alone = whole([head(1, False, dtype, False, options)], False)
        answers = ranks(size).run(head, size, sequence_parallel, dtype, False, options)
        outputs, dx, dw = whole(answers, sequence_parallel)
        for a, b in zip(outputs, alone[0], strict=True):
            assert relative_error(a, b) < 3e-6
            assert a[MASKED] == 0
        assert not dx[MASKED].any()
        assert dx.isfinite().all()
        assert not dw[VOCAB:].any()
        assert relative_error(dx, alone[1]) < bound
        assert relative_error(dw, alone[2]) < 3e-6


@LAYOUTS
def test_ranks_close_to_the_teacher(ranks: Pool, size: int, sequence_parallel: bool) -> None:
    """Against float64, where the correction of the logsumexps' errors must be that of all ranks."""
    p = problem(torch.bfloat16, True)
    flat = {name: p[name].flatten(0, 1) for name in ("hidden", "teacher_hidden", "labels")}
    upstream = p["upstream"].flatten(1)
    flat["hidden"][1] = flat["teacher_hidden"][1] = 0  # the token that does not count
    flat["labels"][1] = -100
    upstream[:, 1] = 0
    c = Case(weight=p["weight"], teacher_weight=p["teacher_weight"], vocab=VOCAB, **flat)
    expected, _, dw = c.truth(DIVERGENCES["all"], *upstream)
    options = {"divergence": DIVERGENCES["all"], "grad_precision": "bf16x3"}
    outputs, _, got = whole(
        ranks(size).run(head, size, sequence_parallel, torch.bfloat16, True, options), sequence_parallel
    )
    assert expected.divergence.median() < 0.02
    assert relative_error(outputs[0].flatten(), expected.divergence) < 1e-5
    assert relative_error(got[:VOCAB], dw[:VOCAB]) < 1e-5


def refusals() -> list[str]:
    """What this rank raises where one rank's arguments alone are wrong, or all ranks' are."""
    p, found = problem(torch.float32, False), []
    rank, group = dist.get_rank(), dist.group.WORLD
    operands = (p["hidden"], p["weight"].chunk(2)[rank], p["teacher_hidden"])
    for teacher_weight, more in (
        (p["teacher_weight"], {}),
        (p["teacher_weight"].chunk(2)[rank], {"mask": p["mask"][:8]}),
        (p["teacher_weight"].chunk(2)[rank], {"sequence_parallel": True, "mask": p["mask"]}),
    ):
        more = dict(more)
        parallel = VocabParallel(group=group, sequence_parallel=more.pop("sequence_parallel", False))
        try:
            linear_distillation(
                *operands, teacher_weight, divergence=DIVERGENCES["all"], vocab_parallel=parallel, **more
            )
        except ValueError as error:
            found.append(str(error))
    return found


def test_shapes_that_do_not_match(ranks: Pool) -> None:
    """Every rank says so before it waits for another."""
    for first, second, third in ranks(2).run(refusals):
        assert "and teacher_weight (256, 'h')" in first
        assert "expected a mask (16, 4), got (8, 4)" in second
        assert "expected a mask (32, 4), got (16, 4)" in third


def no_tokens() -> tuple[Distillation, Tensor]:
    rank, weight = dist.get_rank(), torch.randn(256, 8)
    mine = weight.chunk(2)[rank].clone().requires_grad_()
    parallel = VocabParallel(group=dist.group.WORLD, sequence_parallel=True)
    hidden = torch.zeros(0, 3, 8, requires_grad=True)
    out = linear_distillation(
        hidden,
        mine,
        torch.zeros(0, 3, 8),
        weight.chunk(2)[rank],
        divergence=DIVERGENCES["all"],
        vocab_parallel=parallel,
    )
    out.divergence.sum().backward()
    assert mine.grad is not None
    return Distillation(*(None if x is None else x.detach() for x in out)), mine.grad  # type: ignore[arg-type]


def test_no_tokens(ranks: Pool) -> None:
    for out, dw in ranks(2).run(no_tokens):
        assert out.divergence.shape == (0, 3)
        assert not dw.any()
