"""Run in Triton's interpreter (see `interpreter.py`): the kernels of `linear_distillation` against their definitions,
and the whole operator with them.

The interpreter rounds float32 to bfloat16 towards zero; pieces are compared by their sum.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import VocabParallel, distillation_forward, divergence_gradient, kernels, statistics
from megatron_fp32.ops.logprobs.distillation_kernels import gradient_triton, sums_triton
from megatron_fp32.ops.logprobs.divergence import Pair, sums_torch
from megatron_fp32.ops.logprobs.divergence_gradient import gradient_torch
from tests.ops.distillation_cases import DIVERGENCES, ROWS, TOKENS, VOCAB, Case, case, close_case
from tests.ops.logprobs_cases import softmax

CLOSE = {"far": None, "close": 1e-2, "very close": 1e-4}
"""How far the teacher's products are from the student's."""


def problem(name: str, capped: bool, close: str) -> tuple[Tensor, Tensor, Tensor, Pair, Tensor]:
    """Products of both models, vectors of the forward pass, and local labels; some logits are minus infinity."""
    pair = Pair(
        student=softmax(VOCAB, scale=1.1, softcap=5.0 if capped else None),
        teacher=softmax(VOCAB, scale=0.9, softcap=7.0 if capped else None),
        divergence=DIVERGENCES[name],
    )
    distance, inverse = CLOSE[close], torch.rand(TOKENS) + 0.5
    raw, teacher_raw = torch.randn(2, TOKENS, ROWS) * 4
    if distance is not None:
        # With equal transforms, or the logits would not be close.
        pair = Pair(student=pair.student, teacher=pair.student, divergence=pair.divergence)
        teacher_raw = raw + distance * teacher_raw
    if not capped:
        raw[1, 5] = teacher_raw[1, 5] = -math.inf
        raw[2, :40] = -300
        teacher_raw[2, 20:60] = -300
    z, y = pair.student.logits(raw, inverse)[:, :VOCAB], pair.teacher.logits(teacher_raw, inverse)[:, :VOCAB]
    raw[:, VOCAB:] = teacher_raw[:, VOCAB:] = math.nan
    rows = []
    for logits in (z, y):
        top = logits.amax(1)
        rows += [top, (logits - top[:, None]).double().exp().sum(1).log().float()]
    shift = rows[3] - rows[1]
    vectors = torch.stack([rows[0], rows[1], inverse, rows[2], rows[3], shift])
    return raw, teacher_raw, vectors, pair, pair.student.shard.local_labels(torch.randint(VOCAB, (TOKENS,)))


def sums(name: str, capped: bool, close: str) -> None:
    raw, teacher_raw, vectors, pair, _ = problem(name, capped, close)
    got, expected = sums_triton(raw, teacher_raw, vectors, pair), sums_torch(raw, teacher_raw, vectors, pair)
    assert got.shape == expected.shape
    for field in range(expected.shape[1]):
        size = expected[:, field].abs().amax(0)
        assert ((got - expected)[:, field].abs() <= 3e-6 * size + 1e-12).all(), field


def gradient(name: str, capped: bool, close: str, labels: bool, count: int) -> None:
    raw, teacher_raw, vectors, pair, local = problem(name, capped, close)
    g = torch.randn(TOKENS)
    g[7] = 0
    divergence, values = pair.divergence, torch.rand(2, TOKENS) * 1e-3
    rows = [
        torch.full((TOKENS,), 1e-7), divergence.forward * g, divergence.reverse * g, values[0],
        divergence.jsd * (1 - divergence.beta) * g, values[1],
    ]  # fmt: skip
    if labels:
        of_label = torch.randn(TOKENS)
        of_label[7:9] = 0
        top, log_sum, inverse = vectors[:3]
        rows += [top, log_sum, inverse, of_label, of_label * 0.3]
    # A token without any gradient, whatever its products are, and one with a log-prob's alone.
    raw[7], teacher_raw[7] = math.nan, math.nan
    g[9] = 0
    for row in (1, 2, 4):
        rows[row][9] = 0
    teacher_raw[9] = math.nan
    every = torch.cat([vectors, torch.stack(rows)])
    expected = gradient_torch(raw, teacher_raw, every, local, pair, 0, count, torch.bfloat16, None)
    for columns in (slice(0, 256), slice(256, ROWS)):
        got = gradient_triton(
            raw[:, columns], teacher_raw[:, columns], every, local, pair, columns.start, count, torch.bfloat16, None
        )
        a = sum(piece.double() for piece in got)
        b = sum(piece.double() for piece in expected)[:, columns]
        assert not torch.as_tensor(a)[7].any()
        assert relative_error(torch.as_tensor(a), b) < 2.0 ** (-7 * count) + 3e-6
    scaled = gradient_triton(raw, teacher_raw, every, local, pair, 0, 2, torch.float16, torch.tensor(4096.0))
    whole = gradient_torch(raw, teacher_raw, every, local, pair, 0, 2, torch.float16, torch.tensor(4096.0))
    total, exact = (torch.stack(list(pieces)).double().sum(0) for pieces in (scaled, whole))
    assert relative_error(total, exact) < 3e-5


@contextlib.contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Kernels instead of their definitions."""
    with (
        mock.patch.object(distillation_forward, "statistics_torch", kernels.statistics_triton),
        mock.patch.object(statistics, "combine_torch", kernels.combine_triton),
        mock.patch.object(statistics, "finish_torch", kernels.finish_triton),
        mock.patch.object(distillation_forward, "sums_torch", sums_triton),
        mock.patch.object(divergence_gradient, "gradient_torch", gradient_triton),
    ):
        yield


def results(c: Case, name: str, upstream: Tensor, **options: Any) -> list[Tensor]:
    """Outputs and gradients."""
    c = c.copy()
    out = c.run(
        DIVERGENCES[name], labels=c.labels, vocab_parallel=VocabParallel(vocab_size=c.vocab), grad_precision="bf16x3",
        **options,
    )  # fmt: skip
    torch.autograd.backward(out[:2], list(upstream))
    return [*(x.detach() for x in out if x is not None), c.hidden.grad, c.weight.grad]


def whole_operator(name: str) -> None:
    """As with the definitions; a masked token holds NaN, and so does another's teacher."""
    c, upstream = case(), torch.randn(2, TOKENS)
    with torch.no_grad():
        c.hidden[3], c.teacher_hidden[3], c.weight[VOCAB:] = math.nan, math.nan, math.nan
    upstream[:, 3] = math.nan
    options = {"temperature": torch.rand(TOKENS) + 0.5, "label_temperature": 0.7}
    expected = results(c, name, upstream, **options)
    with kernels_everywhere():
        got = results(c, name, upstream, **options)
    for a, b in zip(got, expected, strict=True):
        assert b.isfinite().all()
        assert relative_error(a, b) < 5e-6


def small_divergence(name: str) -> None:
    c, upstream = close_case(13), torch.randn(40)
    expected, dx, _ = c.truth(DIVERGENCES[name], upstream)
    with kernels_everywhere():
        out = c.run(DIVERGENCES[name])
        out.divergence.backward(upstream)
    assert ((out.divergence.detach() / expected.divergence) - 1).abs().max() < 2e-6
    assert relative_error(c.hidden.grad, dx) < 1e-6


def named(function: Callable[..., None], *arguments: Any) -> tuple[str, Callable[[], None]]:
    return f"{function.__name__}{arguments}", functools.partial(function, *arguments)


CASES: dict[str, Callable[[], None]] = dict(
    [
        named(whole_operator, "all"),
        named(small_divergence, "all"),
        named(small_divergence, "jsd of 0.1"),
        *(named(sums, name, False, "far") for name in ("forward", "reverse", "jsd of 0.1", "all")),
        named(sums, "all", True, "far"),
        # Without a soft cap: two ways to a tanh differ by as much as the logits would.
        *(named(sums, name, False, "very close") for name in ("jsd of 0.9", "all")),
        named(gradient, "forward", False, "far", False, 1),
        named(gradient, "reverse", False, "very close", True, 2),
        named(gradient, "jsd of 0.1", False, "far", True, 3),
        named(gradient, "jsd of 0.9", False, "close", False, 2),
        named(gradient, "all", False, "very close", True, 3),
        named(gradient, "all", True, "far", True, 1),
    ]
)
