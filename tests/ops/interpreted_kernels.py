"""Run in Triton's interpreter (see `interpreter.py`): the kernels against their definitions in torch.

The interpreter rounds float32 to bfloat16 towards zero; pieces are compared by their sum.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs.gradient import gradient_torch, gradient_vectors
from megatron_fp32.ops.logprobs.kernels import (
    combine_triton,
    exponentials_gradient_triton,
    finish_triton,
    gradient_triton,
    statistics_triton,
)
from megatron_fp32.ops.logprobs.softmax import Softmax
from megatron_fp32.ops.logprobs.statistics import (
    KeptLogits,
    combine_torch,
    finish_torch,
    statistics_torch,
)
from megatron_fp32.ops.logprobs.tokens import token_statistics
from megatron_fp32.ops.products.hidden_grad_triton import add_hidden_grad
from megatron_fp32.ops.products.project_triton import project_triton
from megatron_fp32.ops.products.weight_grad_triton import add_weight_grad
from tests.ops.logprobs_cases import ROWS, TOKENS, VOCAB, case, softmax

BLOCKS = -(-ROWS // 128)


def some(softcap: float | None = None, **changes: Any) -> Softmax:
    return softmax(VOCAB, scale=1.1, softcap=softcap, **changes)


def product_and_statistics(softcap: float | None, rows: int) -> None:
    """The fused product against products in float64; blocks that are not there are not written."""
    c, inverse_temperature = case(), torch.rand(TOKENS) + 0.5
    x, w = c.hidden.detach(), c.weight.detach()[:rows].contiguous()
    part = some(softcap, valid_columns=min(VOCAB, rows))
    labels = part.shard.local_labels(c.labels)
    blocks = -(-rows // 128)
    room = torch.full((blocks + 1, 4, TOKENS), torch.nan)
    label_logits, expected_labels = torch.zeros(2, TOKENS)
    kept = KeptLogits.allocate(TOKENS, w, exponentials=False).values.fill_(torch.nan)
    statistics = room[:blocks]
    project_triton(
        x, w, logits=kept, statistics=statistics, labels=labels, label_logits=label_logits,
        inverse_temperature=inverse_temperature, valid_columns=part.shard.valid_columns, scale=1.1, softcap=softcap,
    )  # fmt: skip
    raw = (x.double() @ w.double().t()).float()
    assert relative_error(kept, raw) < 1e-6
    expected = torch.empty_like(statistics)
    statistics_torch(raw, labels, inverse_temperature, part, expected, expected_labels)
    torch.testing.assert_close(statistics, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(label_logits, expected_labels, rtol=1e-5, atol=1e-5)
    assert room[blocks:].isnan().all(), "statistics of a block that does not exist"


def raw_statistics(softcap: float | None, fields: int) -> tuple[Tensor, Tensor]:
    """By the definition: of each block, and the labels' logits."""
    raw, part = torch.randn(TOKENS, ROWS) * 4, some(softcap)
    statistics, label_logits = torch.full((BLOCKS, fields, TOKENS), torch.nan), torch.zeros(TOKENS)
    labels = part.shard.local_labels(case().labels)
    statistics_torch(raw, labels, torch.rand(TOKENS) + 0.5, part, statistics, label_logits)
    return statistics, label_logits


def stored_statistics(softcap: float | None, fields: int) -> None:
    raw, inverse_temperature, part = torch.randn(TOKENS, ROWS) * 4, torch.rand(TOKENS) + 0.5, some(softcap)
    labels = part.shard.local_labels(case().labels)
    got, expected = torch.full((2, BLOCKS, fields, TOKENS), torch.nan)
    got_labels, expected_labels = torch.zeros(2, TOKENS)
    statistics_triton(raw, labels, inverse_temperature, part, got, got_labels)
    statistics_torch(raw, labels, inverse_temperature, part, expected, expected_labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got_labels, expected_labels, rtol=1e-6, atol=1e-6)


def combined_blocks(softcap: float | None, fields: int) -> None:
    statistics, _ = raw_statistics(softcap, fields)
    torch.testing.assert_close(combine_triton(statistics), combine_torch(statistics), rtol=1e-5, atol=2e-5)
    many = statistics.repeat(30, 1, 1)
    torch.testing.assert_close(combine_triton(many), combine_torch(many), rtol=1e-5, atol=1e-3)
    padding = many.new_tensor([-torch.inf, 0, 0, 0, 0])[None, :fields, None].expand(200, fields, TOKENS)
    longer = torch.cat([many, padding])
    assert torch.equal(combine_triton(many), combine_triton(longer)), "blocks of padding changed a bit"


def finished_tokens(softcap: float | None, fields: int) -> None:
    statistics, label_logits = raw_statistics(softcap, fields)
    whole, labels, part = combine_torch(statistics), case().labels, some(softcap)
    got = finish_triton(whole, label_logits, labels, part)
    for a, b in zip(got, finish_torch(whole, label_logits, labels, part), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


TEN_TOKENS = softmax(10)


def finished_labels_of_every_kind() -> None:
    """From e^-100 to all but e^-100 of the probability."""
    labels = torch.tensor([0, 5, 9, -100, 10, -1]).repeat(40)
    statistics = torch.stack([torch.randn(240), torch.rand(240) * 9 + 1, -torch.rand(240)])[None]
    label_logits = statistics[0, 0] + torch.linspace(-100, 100, 240)
    label_logits[::7] = statistics[0, 0, ::7]
    got = finish_triton(statistics, label_logits, labels, TEN_TOKENS)
    expected = finish_torch(statistics.double(), label_logits.double(), labels, TEN_TOKENS)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=1e-6, equal_nan=True)
    sure = (expected[3] < 1e-3) & (expected[3] > 1e-30)
    assert sure.sum() > 20
    torch.testing.assert_close(got[2][sure].double(), expected[2][sure], rtol=1e-5, atol=0)
    torch.testing.assert_close(got[3][sure].double(), expected[3][sure], rtol=1e-5, atol=0)
    assert got[2].isnan().sum() == 80


def finished_label_among_equals(place: float, lowest: int) -> None:
    """The logarithm's own error is all that there is."""
    labels = torch.zeros(240, dtype=torch.int64)
    statistics = torch.stack([torch.zeros(240), torch.logspace(lowest, 6, 240), torch.zeros(240)])[None]
    label_logits = torch.full((240,), place)
    got = finish_triton(statistics, label_logits, labels, TEN_TOKENS)
    expected = finish_torch(statistics.double(), label_logits.double(), labels, TEN_TOKENS)
    torch.testing.assert_close(got[2].double(), expected[2], rtol=4e-7, atol=0)


def finished_label_without_rivals() -> None:
    statistics = torch.tensor([-torch.inf, 0, 0])[None, :, None]
    alone = finish_triton(statistics, torch.tensor([3.0]), torch.zeros(1, dtype=torch.int64), TEN_TOKENS)
    assert [float(x) for x in alone] == [3, 0, 0, 0, 0]


def gradient_operands(softcap: float | None, entropy: bool) -> tuple[Tensor, Tensor, Tensor, Softmax]:
    """Products, vectors and local labels."""
    c, part, inverse_temperature = case(), some(softcap), torch.rand(TOKENS) + 0.5
    x, w = c.hidden.detach(), c.weight.detach()
    statistics = token_statistics(x, w, c.labels, inverse_temperature, part, mean="none")
    g = torch.randn(4, TOKENS)
    vectors = gradient_vectors(
        statistics, inverse_temperature, part, c.labels, logprob=g[0], entropy=g[1] if entropy else None,
        logsumexp=g[2], mean=g[3], mean_of="logit",
    )  # fmt: skip
    return (x.double() @ w.double().t()).float(), vectors, part.shard.local_labels(c.labels), part


def gradient(softcap: float | None, entropy: bool, count: int) -> None:
    raw, *rest = gradient_operands(softcap, entropy)
    got = gradient_triton(raw[:, 128:ROWS], *rest, 128, count, torch.bfloat16, None)
    expected = gradient_torch(raw[:, 128:ROWS], *rest, 128, count, torch.bfloat16, None)
    error = relative_error(sum(p.double() for p in got), sum(p.double() for p in expected))
    assert error < 2.0 ** (-7 * count) + 1e-5, error


def gradient_above_a_cut(softcap: float | None, count: int) -> None:
    """Columns below the cut have none, but for the label; a cut of NaN or -inf leaves all of them."""
    raw, vectors, labels, part = gradient_operands(softcap, False)
    # Between two logits: the last bits of a tanh differ.
    cuts = part.finished_logits(raw, vectors[2]).sort(1).values[:, ROWS // 2 : ROWS // 2 + 2].mean(1)
    cuts[4], cuts[6] = torch.nan, -torch.inf
    columns = slice(128, ROWS)
    arguments = (vectors, labels, part, columns.start, count, torch.bfloat16, None)
    got = sum(p.double() for p in gradient_triton(raw[:, columns], *arguments, cuts=cuts))
    expected = sum(p.double() for p in gradient_torch(raw[:, columns], *arguments, cuts))
    assert isinstance(got, Tensor)
    assert torch.equal(got == 0, expected == 0)
    assert 0.3 < (got == 0).double().mean() < 0.7
    error = relative_error(got, expected)
    assert error < 2.0 ** (-7 * count) + 1e-5, error


def gradient_in_place(softcap: float | None, entropy: bool) -> None:
    """Two pieces of some columns take the place of those logits, and of nothing else."""
    raw, *rest = gradient_operands(softcap, entropy)
    room = torch.full((TOKENS, -(-ROWS // 8) * 8 + 8), torch.nan)
    room[:, :ROWS] = raw
    for first, last in ((0, 256), (256, ROWS)):
        expected = gradient_triton(room[:, first:last], *rest, first, 2, torch.bfloat16, None)
        before = room.clone()
        got = gradient_triton(room[:, first:last], *rest, first, 2, torch.bfloat16, None, True)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        assert got[0].data_ptr() == room[:, first].data_ptr()
        aligned_end = first + -(-(last - first) // 8) * 8
        for others in (slice(0, first), slice(aligned_end, None)):
            assert torch.equal(before[:, others].view(torch.int32), room[:, others].view(torch.int32))


def kept_exponentials(peaked: bool) -> None:
    c, part, inverse_temperature = case(), some(), torch.rand(TOKENS) + 0.5
    x, w, labels = c.hidden.detach(), c.weight.detach(), part.shard.local_labels(c.labels)
    if peaked:
        # Labels e^40 above their block: float16 would have nothing left for the others.
        inside = labels >= 0
        x[inside] += (40 / w.float().square().sum(1).mean() * w[labels[inside]].float()).bfloat16()
    kept = KeptLogits.allocate(TOKENS, w, exponentials=True)
    statistics, label_logits = torch.empty(BLOCKS, 3, TOKENS), torch.zeros(TOKENS)
    project_triton(
        x, w, logits=kept.values, statistics=statistics, labels=labels, label_logits=label_logits,
        inverse_temperature=inverse_temperature, valid_columns=part.shard.valid_columns, scale=1.1,
    )  # fmt: skip
    kept.tops.copy_(statistics[:, 0])
    of_tokens = token_statistics(x, w, c.labels, inverse_temperature, part, mean="none")
    g = torch.randn(3, TOKENS)
    vectors = gradient_vectors(
        of_tokens, inverse_temperature, part, c.labels, logprob=g[0], entropy=None, logsumexp=g[1], mean=g[2],
        mean_of="logprob",
    )  # fmt: skip
    raw = (x.double() @ w.double().t()).float()
    expected = sum(p.double() for p in gradient_torch(raw, vectors, labels, part, 0, 3, torch.bfloat16, None))
    first = slice(0, 100)
    for rows in (first, slice(100, TOKENS)):
        got = exponentials_gradient_triton(
            kept.rows(rows).values, kept.rows(rows).tops, vectors[:, rows], labels[rows], part
        )
        # Towards zero in the interpreter: twice the error of rounding to nearest.
        assert relative_error(got.double(), expected[rows]) < 2.5 * relative_error(expected.bfloat16(), expected)


def stored_logits(dtype: torch.dtype, entropy: bool, same: bool) -> None:
    """Statistics of logits in their own dtype; their gradient in it, into room of its own or over the logits."""
    logits, vectors, labels, part = gradient_operands(None, entropy)
    logits = logits.to(dtype)
    inverse_temperature = vectors[2].contiguous()
    got, expected = torch.full((2, BLOCKS, 3, TOKENS), torch.nan)
    got_labels, expected_labels = torch.zeros(2, TOKENS)
    statistics_triton(logits, labels, inverse_temperature, part, got, got_labels)
    statistics_torch(logits.float(), labels, inverse_temperature, part, expected, expected_labels)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(got_labels, expected_labels, rtol=1e-6, atol=1e-6)
    rest = (vectors, labels, part, 0, 1)
    (exact,) = gradient_torch(logits.float(), *rest, torch.float32, None)
    # Rows of a wider matrix, as those of a chunk.
    room = logits if same else torch.full((TOKENS, logits.shape[1] + 8), torch.nan, dtype=dtype)[:, : logits.shape[1]]
    (gradient,) = gradient_triton(logits, *rest, dtype, None, out=room)
    assert gradient.data_ptr() == room.data_ptr()
    bound = 2e-6 if dtype == torch.float32 else 2.5 * relative_error(exact.to(dtype), exact.double())
    assert relative_error(room.float(), exact.double()) < bound


def weight_gradient(count: int) -> None:
    tokens, rows, columns = 150, 200, 296
    room = torch.randn(tokens, 3, 256).to(torch.bfloat16)
    grads = tuple((room[:, i, :rows] * 2.0 ** (-8 * i)) for i in range(count))
    # Strides that are no row's length, as those of a chunk of dY.
    grads = tuple(torch.empty(tokens, 256, dtype=torch.bfloat16)[:, :rows].copy_(g) for g in grads)
    hidden, target = torch.randn(tokens, columns).bfloat16(), torch.randn(rows, columns)
    expected = target.double() + sum(g.double() for g in grads).t() @ hidden.double()
    add_weight_grad(target, grads, hidden)
    assert relative_error(target, expected) < 1e-6


def hidden_gradient(count: int) -> None:
    """The chain of sums, in one go and in two, from pieces in rows of every alignment."""
    tokens, columns, hidden = 150, 333, 264
    weight = torch.randn(columns, hidden).bfloat16()
    grads = tuple((torch.randn(tokens, columns) * 2.0 ** (-8 * i)).bfloat16() for i in range(count))
    expected = sum(g.double() for g in grads) @ weight.double()
    whole = torch.full((tokens, hidden), torch.nan)
    add_hidden_grad(whole, grads, weight, begin=True)
    assert relative_error(whole, expected) < 1e-6
    chained = torch.full((tokens, hidden), torch.nan)
    add_hidden_grad(chained, tuple(g[:, :128] for g in grads), weight[:128], begin=True)
    add_hidden_grad(chained, tuple(g[:, 128:] for g in grads), weight[128:], begin=False)
    assert torch.equal(chained, whole)


def cases(function: Callable[..., None], **values: Sequence[Any]) -> dict[str, Callable[[], None]]:
    """The function with every combination of values for its arguments."""
    found = {}
    for combination in itertools.product(*values.values()):
        arguments = dict(zip(values, combination, strict=True))
        name = ", ".join(f"{key}={value}" for key, value in arguments.items())
        found[f"{function.__name__}({name})"] = functools.partial(function, **arguments)
    return found


CAPS, COUNTS, FIELDS = (None, 5.0), (1, 2, 3), (3, 4, 5)
CASES: dict[str, Callable[[], None]] = {
    **cases(hidden_gradient, count=COUNTS),
    **cases(weight_gradient, count=COUNTS),
    **cases(finished_labels_of_every_kind),
    **cases(finished_label_among_equals, place=[0.0], lowest=[-30]),
    **cases(finished_label_among_equals, place=[-1.0], lowest=[0]),
    **cases(finished_label_without_rivals),
    # An odd and an even number of blocks.
    **cases(product_and_statistics, softcap=CAPS, rows=(ROWS, 384)),
    **cases(stored_statistics, softcap=CAPS, fields=FIELDS),
    **cases(combined_blocks, softcap=CAPS, fields=FIELDS),
    **cases(finished_tokens, softcap=CAPS, fields=FIELDS),
    **cases(gradient, softcap=CAPS, entropy=(False, True), count=COUNTS),
    **cases(gradient_above_a_cut, softcap=CAPS, count=(1, 2)),
    **cases(gradient_in_place, softcap=CAPS, entropy=(False, True)),
    **cases(
        stored_logits, dtype=(torch.float32, torch.bfloat16, torch.float16), entropy=(False, True), same=(False, True)
    ),
    **cases(kept_exponentials, peaked=(False, True)),
}
