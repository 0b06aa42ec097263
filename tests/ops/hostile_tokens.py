"""Checks of what NaN logits, masked tokens, impossible labels and temperatures may touch: on any device.

Each takes a `Head`: an operator with its options. They run on the CPU in `test_hostile_tokens.py`, with the Triton
kernels in the interpreter in `interpreted_hostile_tokens.py`, and on a GPU in `tests/gpu/test_hostile_tokens.py`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs import VocabParallel, linear_cross_entropy, linear_logprobs, weighted_cross_entropy
from tests.ops.logprobs_cases import grouped

TOKENS, HIDDEN, ROWS, VOCAB = 70, 64, 384, 300  # the last 84 rows of the weight are padding, a whole block among them
MASKED = [0, 5, 64, 69]
NAN = math.nan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """An operator with its options."""

    operator: str
    dtype: torch.dtype = torch.bfloat16
    wide_hidden: bool = False
    wide_weight: bool = False
    biased: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    device: str = "cpu"

    def __str__(self) -> str:
        options = ",".join(f"{k}={v}" for k, v in self.options.items())
        names = ("wide_hidden", "wide_weight", "biased")
        flags = "".join(f"-{name}" for name in names if getattr(self, name))
        return f"{self.operator}-{self.dtype}{flags}-{options}"

    def problem(self) -> Problem:
        """Fresh operands; all labels are tokens of the vocabulary."""
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(self.dtype)
        weight = (torch.randn(ROWS, HIDDEN, generator=generator) / 4).to(self.dtype)
        bias = torch.linspace(-1, 1, ROWS)
        bias[VOCAB:] = NAN
        return Problem(
            hidden=(hidden.float() if self.wide_hidden else hidden).to(self.device),
            weight=(weight.float() + 2.0**-20 if self.wide_weight else weight).to(self.device),
            bias=bias.to(self.device) if self.biased else None,
            labels=torch.randint(VOCAB, (TOKENS,), generator=generator).to(self.device),
            temperature=(torch.rand(TOKENS, generator=generator) + 0.5).to(self.device),
            weights=(torch.rand(TOKENS, generator=generator) + 0.5).to(self.device),
        )


@dataclasses.dataclass(kw_only=True)
class Problem:
    """Operands of one call; `weights` are upstream gradients, or weights of the losses."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    temperature: Tensor
    weights: Tensor

    def run(self, head: Head) -> Result:
        """Call the operator and differentiate what it returns."""
        x, w = self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()
        b = None if self.bias is None else self.bias.clone().requires_grad_()
        options = grouped({"vocab_size": VOCAB, "temperature": self.temperature, "bias": b, **head.options})
        if head.operator == "logprobs":
            out = linear_logprobs(x, w, self.labels, mean_logit=True, top_k=3, **options)
            values = dict(zip(out._fields, out, strict=True))
            torch.autograd.backward(out[:4], [self.weights] * 4)
        elif head.operator == "entropy":
            out = linear_logprobs(x, w, self.labels, **options)
            values = {"entropy": out.entropy, "logsumexp": out.logsumexp}
            torch.autograd.backward(list(values.values()), [self.weights] * 2)
        elif head.operator == "loss":
            values = {"loss": linear_cross_entropy(x, w, self.labels, **options)}
            values["loss"].backward(self.weights)
        else:
            weighted = weighted_cross_entropy(x, w, self.labels, self.weights, **options)
            values = {"losses": weighted.losses}
            weighted.total.backward()
            assert weighted.total.isfinite() == weighted.losses.isfinite().all()
        return Result(
            values={k: v.detach() for k, v in values.items()}, dx=x.grad, dw=w.grad, db=None if b is None else b.grad
        )


@dataclasses.dataclass(kw_only=True)
class Result:
    """What the operator returned, [tokens, ...] each, and its gradients."""

    values: dict[str, Tensor]
    dx: Tensor
    dw: Tensor
    db: Tensor | None

    def assert_same(self, other: Result, rows: Tensor | None = None, *, gradients: bool = True) -> None:
        """Bit for bit, for all tokens or those of `rows`; dW always for all of them."""
        chosen = slice(None) if rows is None else rows
        for name, value in self.values.items():
            assert same_bits(value[chosen], other.values[name][chosen]), name
        if gradients:
            assert same_bits(self.dx[chosen], other.dx[chosen]), "dX"
            assert same_bits(self.dw, other.dw), "dW"
            self.assert_same_bias_grad(other)

    def assert_same_bias_grad(self, other: Result) -> None:
        """Bit for bit, and 0 for padding."""
        assert (self.db is None) == (other.db is None)
        if self.db is not None and other.db is not None:
            assert same_bits(self.db, other.db), "dbias"
            assert not self.db[VOCAB:].any()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return torch.equal(a.nan_to_num(nan=1e30), b.nan_to_num(nan=1e30)) and torch.equal(a.isnan(), b.isnan())


def others(head: Head, tokens: list[int] = MASKED) -> Tensor:
    """[tokens] bool: all but these."""
    mask = torch.ones(TOKENS, dtype=torch.bool, device=head.device)
    mask[tokens] = False
    return mask


def nan_row_of_the_weight(head: Head) -> None:
    """One NaN in the vocabulary, wherever it stands in a block, makes every token's results NaN but ignored ones."""
    for row in (0, 131, 256, VOCAB - 1):
        p = head.problem()
        p.labels[p.labels == row] = 7
        p.labels[3], p.labels[4] = -100, row
        p.weight[row] = NAN
        result = p.run(head)
        for name, value in result.values.items():
            if name == "top_tokens":
                continue
            assert value[others(head, [3])].isnan().all(), f"{name} with a NaN in row {row}"
            assert (value[3] == 0).all(), name
        assert result.dx[others(head, [3])].isnan().all()
        assert (result.dx[3] == 0).all()
        assert result.dw.isnan().any()


def nan_beside_padding_alone(head: Head) -> None:
    """A block with one valid column, which is NaN: not a block of padding."""
    p = head.problem()
    p.labels.clamp_(max=127)
    head = dataclasses.replace(head, options={**head.options, "vocab_size": 129})
    p.weight[128] = NAN
    for name, value in p.run(head).values.items():
        assert name == "top_tokens" or value.isnan().all(), name


def nan_hidden_states_of_one_token(head: Head) -> None:
    """They make that token's results NaN, and no others'."""
    clean, p = head.problem().run(head), head.problem()
    p.hidden[5, 2] = NAN
    result = p.run(head)
    for name, value in result.values.items():
        assert name == "top_tokens" or value[5].isnan().all(), name
    rows = others(head, [5])
    result.assert_same(clean, rows, gradients=False)
    assert same_bits(result.dx[rows], clean.dx[rows])
    assert result.dx[5].isnan().all()
    assert result.dw.isnan().any()


def infinite_logits(head: Head) -> None:
    """A logit of minus infinity is a probability of 0; one of plus infinity makes a token's results NaN."""
    if head.wide_hidden:
        # Of the pieces of a float32 number some are 0 or have the other sign: infinity times these is NaN.
        return
    p = head.problem()
    p.hidden[:, 0] = p.hidden[:, 0].abs() + 1
    p.hidden[::2, 0] *= -1
    p.weight[9], p.weight[9, 0] = 0, math.inf
    p.labels[p.labels == 9] = 8
    logits = p.hidden.double() @ p.weight.double().t()[:, :VOCAB] / p.temperature.double()[:, None]
    truth = logits.log_softmax(1).gather(1, p.labels[:, None])[:, 0]
    out = linear_logprobs(
        p.hidden, p.weight, p.labels, vocab_parallel=VocabParallel(vocab_size=VOCAB), temperature=p.temperature,
        top_k=2,
        **{k: v for k, v in head.options.items() if k == "invariant"},
    )  # fmt: skip
    assert truth[::2].isfinite().all()
    assert truth[1::2].isnan().all()
    torch.testing.assert_close(out.logprobs.double(), truth, rtol=1e-5, atol=1e-5, equal_nan=True)
    entropy = torch.special.entr(logits.softmax(1)).sum(1)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=1e-5, atol=1e-5, equal_nan=True)


def masked_tokens(head: Head) -> None:
    """Tokens whose label is ignored: 0 everywhere, whatever they hold, and nothing for anybody else."""
    clean, p = head.problem(), head.problem()
    clean.labels[MASKED] = p.labels[MASKED] = -100
    expected = clean.run(head)
    p.hidden[MASKED[0]], p.hidden[MASKED[1]] = NAN, math.inf
    p.hidden[MASKED[2]] = 6e4 if head.dtype == torch.float16 else 3e38
    p.temperature[MASKED] = torch.tensor([0.0, NAN, -1.0, math.inf], device=head.device)
    p.weights[MASKED] = torch.tensor([NAN, math.inf, 0.0, -1.0], device=head.device)
    assert_masked(p.run(head), expected, head)


def ignored_label_of_the_vocabulary(head: Head) -> None:
    """A token of the vocabulary as `ignore_index` masks its labels, and is a column of the logits as before."""
    for index in (0, 130, VOCAB - 1):
        clean, p = head.problem(), head.problem()
        for each in (clean, p):
            each.labels[each.labels == index] = 7
        clean.labels[MASKED], p.labels[MASKED] = -100, index
        p.hidden[MASKED[0]], p.hidden[MASKED[1]] = NAN, math.inf
        p.temperature[MASKED[:3]] = torch.tensor([0.0, NAN, -1.0], device=head.device)
        p.weights[MASKED] = torch.tensor([NAN, math.inf, 1.0, -1.0], device=head.device)
        masking = dataclasses.replace(head, options={**head.options, "ignore_index": index})
        assert_masked(p.run(masking), clean.run(head), head)


def weights_of_zero(head: Head) -> None:
    """A token that a loss mask leaves out is an ignored one, whatever its label."""
    if head.operator != "weighted":
        return
    clean, p = head.problem(), head.problem()
    clean.labels[MASKED] = -100
    p.weights[MASKED] = 0
    p.labels[MASKED] = torch.tensor([-1, VOCAB, ROWS + 9, 4], device=head.device)
    p.hidden[MASKED[0]], p.hidden[MASKED[1]] = NAN, math.inf
    p.temperature[MASKED] = torch.tensor([0.0, NAN, -1.0, 1.0], device=head.device)
    assert_masked(p.run(head), clean.run(head), head)


def assert_masked(result: Result, expected: Result, head: Head) -> None:
    """The masked tokens are 0, and all else is as expected."""
    for name, value in result.values.items():
        assert (value[MASKED] == (-1 if name == "top_tokens" else 0)).all(), name
        assert not value[MASKED].signbit().any() or name == "top_tokens", f"{name} is -0"
    assert (result.dx[MASKED] == 0).all()
    result.assert_same(expected)
    assert expected.dw.isfinite().all()


def upstream_gradients_of_zero(head: Head) -> None:
    """Of tokens that are not ignored: their results say what is wrong, their gradients are 0."""
    if head.operator == "weighted":
        return
    clean, p = head.problem(), head.problem()
    clean.weights[MASKED] = p.weights[MASKED] = 0
    expected = clean.run(head)
    p.labels[MASKED[0]] = -1
    p.labels[MASKED[1]] = VOCAB
    p.hidden[MASKED[2]] = NAN
    p.temperature[MASKED[3]] = 0
    result = p.run(head)
    assert (result.dx[MASKED] == 0).all()
    rows = others(head)
    assert same_bits(result.dx[rows], expected.dx[rows])
    assert same_bits(result.dw, expected.dw)
    result.assert_same_bias_grad(expected)
    for name, value in result.values.items():
        assert same_bits(value[rows], expected.values[name][rows]), name
        if name != "top_tokens":
            assert value[MASKED[3]].isnan().all(), f"{name} with a temperature of 0"
    if "logprobs" in result.values:
        assert result.values["logprobs"][MASKED[:2]].isnan().all()


def impossible_labels(head: Head) -> None:
    """They make the log-prob NaN, and what comes from it. The entropy does not depend on the label."""
    clean, p = head.problem().run(head), head.problem()
    p.labels[11] = VOCAB + 3
    result = p.run(head)
    rows = others(head, [11])
    assert same_bits(result.dx[rows], clean.dx[rows])
    if head.operator == "entropy":
        for name, value in result.values.items():
            torch.testing.assert_close(value[11], clean.values[name][11], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.dx[11], clean.dx[11], rtol=2e-2, atol=2e-3)
        assert result.dw.isfinite().all()
    else:
        assert result.dx[11].isnan().all()


def impossible_temperatures(head: Head) -> None:
    """They make that token's results NaN, and no others'."""
    clean, p = head.problem().run(head), head.problem()
    bad = [2, 9, 33, 34]
    p.temperature[bad] = torch.tensor([0.0, -1.0, NAN, math.inf], device=head.device)
    result = p.run(head)
    for name, value in result.values.items():
        assert name == "top_tokens" or value[bad].isnan().all(), name
    rows = others(head, bad)
    result.assert_same(clean, rows, gradients=False)
    assert same_bits(result.dx[rows], clean.dx[rows])
    assert result.dx[bad].isnan().all()


def poisoned_padding(head: Head) -> None:
    """Rows of the weight beyond the vocabulary touch nothing."""
    clean, p = head.problem(), head.problem()
    clean.weight[VOCAB:] = 0
    p.weight[VOCAB:] = torch.tensor([NAN, math.inf, -math.inf], device=head.device).repeat(28)[:, None].to(head.dtype)
    expected, result = clean.run(head), p.run(head)
    result.assert_same(expected)
    assert (result.dw[VOCAB:] == 0).all()
    assert result.dx.isfinite().all()


CHECKS = [
    nan_row_of_the_weight,
    nan_beside_padding_alone,
    nan_hidden_states_of_one_token,
    infinite_logits,
    masked_tokens,
    ignored_label_of_the_vocabulary,
    weights_of_zero,
    upstream_gradients_of_zero,
    impossible_labels,
    impossible_temperatures,
    poisoned_padding,
]


def heads(device: str = "cpu") -> list[Head]:
    """Every operator, and every way through the code that is not another's."""
    float16, smooth = torch.float16, {"label_smoothing": 0.1, "z_loss": 1e-3}
    found = []
    for operator in ("logprobs", "entropy", "loss", "weighted"):
        loss = smooth if operator in ("loss", "weighted") else {}
        found += [
            Head(operator=operator),
            Head(operator=operator, options={"grad_precision": "bf16x2", **loss}),
            Head(operator=operator, options={"invariant": True, **loss}),
            Head(operator=operator, dtype=float16, options={"grad_precision": "bf16x3"}),
        ]
    found += [
        Head(operator="logprobs", options={"backward": "saved"}),
        Head(operator="logprobs", options={"softcap": 5.0, "scale": 1.3, "grad_precision": "bf16x3"}),
        Head(operator="logprobs", dtype=float16, wide_hidden=True, options={"grad_precision": "bf16x2"}),
        Head(operator="logprobs", dtype=torch.float32),
        Head(operator="logprobs", wide_weight=True, options={"grad_precision": "bf16x2"}),
        Head(operator="weighted", wide_weight=True, biased=True, options={"chunk_size": 32}),
        Head(operator="logprobs", biased=True, options={"softcap": 5.0, "grad_precision": "bf16x2"}),
        Head(operator="loss", biased=True, options={"invariant": True, "backward": "saved", **smooth}),
        Head(operator="weighted", dtype=float16, biased=True, options={"grad_precision": "bf16x2"}),
        Head(operator="weighted", wide_hidden=True, options={"grad_precision": "bf16x2", "chunk_size": 32}),
        Head(operator="loss", options={"invariant": True, "grad_precision": "bf16x2", "chunk_size": 32}),
    ]
    return [dataclasses.replace(head, device=device) for head in found]
