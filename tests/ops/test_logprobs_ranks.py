"""The head without logits over two and four ranks, against one rank."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import (
    VocabParallel,
    linear_cross_entropy,
    linear_logprobs,
    linear_selected_logprobs,
    linear_top_logprobs,
    weighted_cross_entropy,
)
from megatron_fp32.ops.products import invariant_hidden_grad
from megatron_fp32.testing.ranks import RankPool
from tests.ops.logprobs_cases import case, grouped, with_main_grad

Pool = Callable[[int], RankPool]
TOKENS, HIDDEN, VOCAB = (16, 8), 96, 1000
LAYOUTS = pytest.mark.parametrize(
    ("size", "sequence_parallel"), [(2, False), (2, True), (4, True)], ids=["tp2", "tp2+sp", "tp4+sp"]
)


def padded(ranks: int) -> int:
    """Rows of the weight under Megatron's padding: on four ranks, the last has padding alone in half of its blocks."""
    return -(-VOCAB // (128 * ranks)) * 128 * ranks


def problem(dtype: torch.dtype, ranks: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    hidden = (torch.randn(*TOKENS, HIDDEN) * 3).to(dtype)
    weight = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).to(dtype)
    # What lies in the padding must not matter, and neither must the hidden states of an ignored token.
    weight = torch.cat([weight, torch.full((padded(ranks) - VOCAB, HIDDEN), torch.nan, dtype=dtype)])
    labels = torch.randint(VOCAB, TOKENS)
    labels[0, 0], labels[1, 1], labels[2, 2] = -100, 0, VOCAB - 1
    hidden[0, 0] = torch.nan
    return {"hidden": hidden, "weight": weight, "labels": labels, "weights": torch.rand(TOKENS)}


def several(labels: Tensor) -> Tensor:
    """The label and four tokens more, which lie on all ranks; one of them twice."""
    more = torch.stack([(labels * factor + 17 * factor) % VOCAB for factor in (3, 7, 7, 11)], -1)
    few = torch.cat([labels[..., None], more], -1)
    return torch.where(labels[..., None] == -100, -100, few)


def head(
    ranks: int, sequence_parallel: bool, operator: str, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, Any]:
    """On one rank: outputs, this rank's dX and dW. `group_size` in the options is that of the invariant dX."""
    with contextlib.ExitStack() as stack:
        if "group_size" in options:
            for name in ("CHUNK", "UNSPLIT_CHUNK"):
                stack.enter_context(patch.object(invariant_hidden_grad, name, options["group_size"]))
            options = {name: value for name, value in options.items() if name != "group_size"}
        return unpatched_head(ranks, sequence_parallel, operator, dtype, options)


def unpatched_head(
    ranks: int, sequence_parallel: bool, operator: str, dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, Any]:
    p = problem(dtype, ranks)
    rank = dist.get_rank() if ranks > 1 else 0
    group = dist.group.WORLD if ranks > 1 else None
    hidden = (p["hidden"].chunk(ranks)[rank] if sequence_parallel else p["hidden"]).clone().requires_grad_()
    weight = p["weight"].chunk(ranks)[rank].clone().requires_grad_()
    shared = grouped({"vocab_size": VOCAB, "group": group, "sequence_parallel": sequence_parallel, **options})
    with_main_grad(weight)
    if operator == "weighted":
        out = weighted_cross_entropy(hidden, weight, p["labels"], p["weights"], **shared)
        out.total.backward()
        outputs = list(out)
    elif operator == "loss":
        losses = linear_cross_entropy(hidden, weight, p["labels"], label_smoothing=0.1, z_loss=1e-3, **shared)
        losses.backward(p["weights"])
        outputs = [losses]
    elif operator in ("selected", "top"):
        few = several(p["labels"])
        result: Any = (
            linear_selected_logprobs(hidden, weight, few, **shared)
            if operator == "selected"
            else linear_top_logprobs(hidden, weight, 5, mask=p["labels"] != -100, **shared)
        )
        weights = torch.rand(*TOKENS, 5, generator=torch.Generator().manual_seed(3))
        of_slots = result.logprobs * weights + 0.2 * result.logits * weights.flip(-1)
        (of_slots.sum(-1) + p["weights"] * result.rest + 0.3 * result.entropy - result.logsumexp).sum().backward()
        outputs = list(result)
    else:
        result = linear_logprobs(hidden, weight, p["labels"], top_k=7, **shared)
        (result.logprobs * p["weights"] + 0.3 * result.entropy).sum().backward()
        outputs = [x for x in result if x is not None]
    return {"outputs": [x.detach() for x in outputs], "dX": hidden.grad, "dW": weight.main_grad}


def run(ranks: Pool, size: int, sequence_parallel: bool, *args: Any) -> list[dict[str, Any]]:
    if size == 1:
        return [head(1, False, *args)]
    return ranks(size).run(head, size, sequence_parallel, *args)


def whole(answers: list[dict[str, Any]], sequence_parallel: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    for answer in answers[1:]:
        assert all(torch.equal(a, b) for a, b in zip(answer["outputs"], answers[0]["outputs"], strict=True))
        assert sequence_parallel or torch.equal(answer["dX"], answers[0]["dX"])
    dx = torch.cat([a["dX"] for a in answers]) if sequence_parallel else answers[0]["dX"]
    return answers[0]["outputs"], dx, torch.cat([a["dW"] for a in answers])[:VOCAB]


def refused_sizes(ranks: int, operator: Any, rows: list[int], vocab_size: int | None) -> str:
    """What this rank raises for shards of so many rows."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 16), torch.randn(sum(rows), 16)
    mine = weight.split(rows)[dist.get_rank()].clone().requires_grad_()
    parallel = VocabParallel(group=dist.group.WORLD, vocab_size=vocab_size)
    extra = (torch.ones(8),) if operator is weighted_cross_entropy else ()
    try:
        operator(hidden, mine, torch.randint(min(rows) + 1, (8,)), *extra, vocab_parallel=parallel)
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("operator", [linear_logprobs, linear_cross_entropy, weighted_cross_entropy])
@pytest.mark.parametrize(
    ("rows", "vocab_size"), [([151, 150], None), ([151, 150], 301), ([100, 0], None), ([76, 76, 76, 73], None)], ids=str
)
def test_shards_of_different_sizes(ranks: Pool, operator: Any, rows: list[int], vocab_size: int | None) -> None:
    """Every rank says so, and none waits for another."""
    for error in ranks(len(rows)).run(refused_sizes, len(rows), operator, rows, vocab_size):
        assert f"equally many rows on every rank of vocab_parallel.group, got {rows} rows" in error


@LAYOUTS
@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("logprobs", {"backward": "recompute"}),
        ("logprobs", {"backward": "saved"}),
        ("loss", {"backward": "recompute"}),
        ("weighted", {"chunk_size": 64}),
        ("selected", {"chunk_size": 64}),
        ("top", {}),
    ],
)
def test_ranks_agree_with_one(
    ranks: Pool, size: int, sequence_parallel: bool, operator: str, options: dict[str, Any]
) -> None:
    options = {"grad_precision": "bf16x3", "softcap": 20.0, "temperature": 0.9, **options}
    for dtype, bound in ((torch.float32, 2e-6), (torch.bfloat16, 3e-3)):
        alone = whole(run(ranks, 1, False, operator, dtype, options), False)
        outputs, dx, dw = whole(run(ranks, size, sequence_parallel, operator, dtype, options), sequence_parallel)
        for a, b in zip(outputs, alone[0], strict=True):
            assert relative_error(a, b) < 2e-6
        # A different order of the sum over ranks moves few values over a rounding boundary.
        assert relative_error(dx, alone[1]) < bound / 3
        assert relative_error(dw, alone[2]) < 2e-6


# One group over all ranks, groups that end within a rank, one that begins with each rank, several on each.
@pytest.mark.parametrize("group_size", [2**15, 384, 256, 128])
@LAYOUTS
def test_invariant_over_ranks_with_the_gradient_of_the_hidden_states(
    ranks: Pool, size: int, sequence_parallel: bool, group_size: int
) -> None:
    for operator, dtype, more in (
        ("logprobs", torch.bfloat16, {"grad_precision": "bf16x2", "backward": "saved"}),
        ("loss", torch.float16, {}),
        ("weighted", torch.bfloat16, {"chunk_size": 48}),
        ("selected", torch.bfloat16, {"grad_precision": "bf16x2"}),
        ("top", torch.bfloat16, {}),
    ):
        options = {"invariant": True, "temperature": 0.9, "group_size": group_size, **more}
        alone, dx, _ = whole(run(ranks, 1, False, operator, dtype, options), False)
        outputs, parallel_dx, _ = whole(
            run(ranks, size, sequence_parallel, operator, dtype, options), sequence_parallel
        )
        assert all(torch.equal(a, b) for a, b in zip(outputs, alone, strict=True))
        assert torch.equal(dx, parallel_dx)
        # dX was rounded to the dtype of the hidden states; whether it is right shows without that order.
        usual = {**options, "invariant": False}
        _, expected, _ = whole(run(ranks, 1, False, operator, dtype, usual), False)
        assert relative_error(dx, expected.double()) < 2.0 ** (-9 if dtype == torch.bfloat16 else -12)


def uneven(invariant: bool) -> str:
    c = case()
    try:
        parallel = VocabParallel(group=dist.group.WORLD)
        linear_logprobs(c.hidden.detach(), c.weight.detach(), c.labels, vocab_parallel=parallel, invariant=invariant)
    except ValueError as error:
        return str(error)
    return "no error"


def test_blocks_that_would_cross_ranks_are_refused(ranks: Pool) -> None:
    assert all("a multiple of 128 rows of the weight on every rank, got 700" in e for e in ranks(2).run(uneven, True))
    assert ranks(2).run(uneven, False) == ["no error"] * 2
