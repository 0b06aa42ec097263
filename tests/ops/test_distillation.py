"""Divergences, log-probs and their gradients against float64, on the CPU; and what a token may touch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import LogitsTransform, VocabParallel
from megatron_fp32.ops.logprobs.distillation import linear_distillation
from megatron_fp32.ops.logprobs.divergence import log_ratio_of_mixture, psi
from tests.ops.distillation_cases import (
    DIVERGENCES,
    TOKENS,
    VOCAB,
    Case,
    case,
    case_of_logits,
    close_case,
)
from tests.ops.logprobs_cases import rounded_error, with_main_grad

PADDED = VocabParallel(vocab_size=VOCAB)
FORWARD, ALL = DIVERGENCES["forward"], DIVERGENCES["all"]
# What is lost in fp32: products of 96 terms, then exponentials of logits of up to 12.
FP32 = 3e-6
EVERY = pytest.mark.parametrize("name", DIVERGENCES)


def bent(counts: torch.Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything that changes the logits, as the operator takes it and as the truth does."""
    temperature = torch.rand(TOKENS) + 0.5
    temperature[~counts] = torch.nan
    as_given = {"temperature": temperature, "label_temperature": 1.7}
    operator = {
        **as_given, "logits_transform": LogitsTransform(scale=1.3, softcap=5.0),
        "teacher_logits_transform": LogitsTransform(scale=0.8, softcap=9.0),
    }  # fmt: skip
    return operator, {**as_given, "student": (1.3, 5.0), "teacher": (0.8, 9.0)}


class TestAgainstFloat64:
    @pytest.mark.parametrize("kind", ["plain", "bent"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    @EVERY
    def test_outputs_and_gradients(self, name: str, dtype: torch.dtype, kind: str) -> None:
        c, divergence, upstream = case(dtype), DIVERGENCES[name], torch.randn(2, TOKENS)
        operator, truth = bent(c.labels != -100) if kind == "bent" else ({}, {})
        out = c.run(divergence, labels=c.labels, vocab_parallel=PADDED, grad_precision="bf16x3", **operator)
        torch.autograd.backward(out[:2], list(upstream))
        expected, dx, dw = c.truth(divergence, *upstream, **truth)
        for field, value, exact in zip(out._fields, out, expected, strict=True):
            assert value is not None
            assert value.dtype == torch.float32, field
            assert relative_error(value.detach(), exact) < FP32, field
            assert value[3] == 0, field
        assert relative_error(c.hidden.grad, dx) < 1.05 * rounded_error(dx, dtype) + 3 * FP32
        assert relative_error(c.weight.grad, dw) < 1.05 * rounded_error(dw, dtype) + 3 * FP32

    @EVERY
    def test_without_labels(self, name: str) -> None:
        c, upstream = case(), torch.randn(TOKENS)
        out = c.run(DIVERGENCES[name], mask=c.labels != -100, vocab_parallel=PADDED, temperature=2.0)
        out.divergence.backward(upstream)
        expected, dx, dw = c.truth(DIVERGENCES[name], upstream, temperature=2.0)
        assert out.logprobs is None
        assert relative_error(out.divergence.detach(), expected.divergence) < FP32
        assert relative_error(c.hidden.grad, dx) < 3 * FP32
        assert relative_error(c.weight.grad, dw) < 3 * FP32

    @pytest.mark.parametrize("temperature", [1.0, 0.6])
    @pytest.mark.parametrize("which", [0, 1])
    def test_each_output_alone(self, which: int, temperature: float) -> None:
        c, upstream = case(), torch.zeros(2, TOKENS)
        upstream[which] = torch.randn(TOKENS)
        out = c.run(ALL, labels=c.labels, vocab_parallel=PADDED, label_temperature=temperature)
        out[which].backward(upstream[which])
        _, dx, dw = c.truth(ALL, *upstream, label_temperature=temperature)
        assert relative_error(c.hidden.grad, dx) < 3 * FP32
        assert relative_error(c.weight.grad, dw) < 3 * FP32

    @pytest.mark.parametrize(("precision", "bound"), [("bf16", 4e-3), ("bf16x2", 2e-5), ("bf16x3", FP32)])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_precision_of_the_gradient(self, dtype: torch.dtype, precision: Any, bound: float) -> None:
        """An fp32 residual stream and main_grad show what dY lost."""
        c, upstream = case(dtype), torch.randn(2, TOKENS)
        wide = c.hidden.detach().float().requires_grad_()
        out = linear_distillation(
            wide, with_main_grad(c.weight), c.teacher_hidden.float(), c.teacher_weight, divergence=ALL, labels=c.labels,
            vocab_parallel=PADDED, grad_precision=precision,
        )  # fmt: skip
        torch.autograd.backward(out[:2], list(upstream))
        _, dx, dw = c.truth(ALL, *upstream)
        assert relative_error(wide.grad, dx) < bound
        assert relative_error(c.weight.main_grad, dw) < bound
        assert dtype == torch.float16 or relative_error(wide.grad, dx) > bound / 30

    def test_a_teacher_of_another_dtype(self) -> None:
        c, wide, upstream = case(torch.bfloat16), case(torch.float32), torch.randn(TOKENS)
        c.teacher_hidden, c.teacher_weight = wide.teacher_hidden, wide.teacher_weight
        out = c.run(ALL, labels=c.labels, vocab_parallel=PADDED, grad_precision="bf16x3")
        out.divergence.backward(upstream)
        expected, dx, _ = c.truth(ALL, upstream)
        assert relative_error(out.divergence.detach(), expected.divergence) < FP32
        assert relative_error(c.hidden.grad, dx) < 1.05 * rounded_error(dx, torch.bfloat16) + 3 * FP32

    @given(
        tokens=st.integers(1, 70), hidden=st.integers(1, 30), rows=st.integers(1, 300), seed=st.integers(0, 1000),
        name=st.sampled_from(sorted(DIVERGENCES)), data=st.data(),
    )  # fmt: skip
    @settings(deadline=None, max_examples=25, derandomize=True)
    def test_any_shape(self, tokens: int, hidden: int, rows: int, seed: int, name: str, data: st.DataObject) -> None:
        torch.manual_seed(seed)
        vocab, other = data.draw(st.integers(1, rows)), data.draw(st.integers(1, 30))
        c = Case(
            hidden=torch.randn(tokens, hidden), weight=torch.randn(rows, hidden),
            teacher_hidden=torch.randn(tokens, other), teacher_weight=torch.randn(rows, other),
            labels=torch.randint(vocab, (tokens,)), vocab=vocab,
        ).copy()  # fmt: skip
        upstream = torch.randn(2, tokens)
        out = c.run(DIVERGENCES[name], labels=c.labels, vocab_parallel=VocabParallel(vocab_size=vocab))
        torch.autograd.backward(out[:2], list(upstream))
        expected, dx, dw = c.truth(DIVERGENCES[name], *upstream)
        size = 1 + expected.divergence.abs().max()
        assert (out.divergence.detach() - expected.divergence).abs().max() < 1e-5 * size
        assert (c.hidden.grad - dx).abs().max() < 3e-5 * size * (1 + upstream.abs().max())
        assert (c.weight.grad - dw).abs().max() < 3e-4 * size


class TestCloseToTheTeacher:
    """Products are exact here: what is measured is what happens after them."""

    @pytest.mark.parametrize("step", [6, 9, 13])
    @EVERY
    def test_a_small_divergence_keeps_its_digits(self, name: str, step: int) -> None:
        """Down to a KL of 1e-8 every token's error is relative to itself; sums of q d would be off by all of it."""
        c, upstream = close_case(step), torch.randn(40)
        out = c.run(DIVERGENCES[name])
        out.divergence.backward(upstream)
        expected, dx, dw = c.truth(DIVERGENCES[name], upstream)
        assert step != 13 or expected.divergence.max() < 1e-6
        assert ((out.divergence.detach() / expected.divergence) - 1).abs().max() < 2e-6
        assert relative_error(c.hidden.grad, dx) < 1e-6
        assert relative_error(c.weight.grad, dw) < 1e-6

    @EVERY
    def test_the_same_model_has_no_divergence(self, name: str) -> None:
        c = case(torch.bfloat16)
        c.teacher_hidden, c.teacher_weight = c.hidden.detach(), c.weight.detach()
        out = c.run(DIVERGENCES[name], vocab_parallel=PADDED)
        out.divergence.sum().backward()
        assert not out.divergence.any()
        assert not c.hidden.grad.any()

    @pytest.mark.parametrize("level", [-1000.0, 1000.0])
    @EVERY
    def test_a_constant_is_no_divergence(self, name: str, level: float) -> None:
        """Logits that differ by a number for all of a token: the difference of the logsumexps must not leave a rest."""
        torch.manual_seed(0)
        z = torch.randint(-80, 81, (20, 300)) / 16
        c = case_of_logits(z, z + level)
        out = c.run(DIVERGENCES[name])
        out.divergence.sum().backward()
        assert out.divergence.abs().max() < 1e-12
        assert c.hidden.grad.abs().max() < 1e-12

    @EVERY
    def test_it_is_never_negative(self, name: str) -> None:
        torch.manual_seed(0)
        z = torch.randn(200, 500)
        c = case_of_logits(z, z + 1e-7 * torch.randn(200, 500))
        assert (c.run(DIVERGENCES[name]).divergence >= 0).all()

    def test_psi(self) -> None:
        t = torch.cat([torch.logspace(-30, 0, 2000)[:-1], torch.linspace(1e-3, 0.9999, 999)])
        t = torch.cat([t, -t])
        wide = t.double()
        series = sum(wide**k / math.factorial(k) for k in range(2, 20))
        normal = series > 1e-37
        assert (psi(t)[normal] / series[normal] - 1).abs().max() < 4e-7

    @pytest.mark.parametrize("part", [1e-6, 0.1, 0.5, 0.9, 1 - 1e-6])
    def test_log_of_the_mixture(self, part: float) -> None:
        d = torch.linspace(-90, 90, 4001)
        exact = torch.logaddexp(d.double() + math.log(part), torch.full_like(d, math.log1p(-part)).double())
        torch.testing.assert_close(log_ratio_of_mixture(d, part, 1 - part).double(), exact, rtol=1e-6, atol=2e-7)
        ends = log_ratio_of_mixture(torch.tensor([-math.inf, math.inf, math.nan]), part, 1 - part)
        assert ends[0].item() == pytest.approx(math.log1p(-part), rel=1e-6)
        assert ends[1] == math.inf
        assert ends[2].isnan()


class TestExtremes:
    @pytest.mark.parametrize("level", [-8192.0, 8192.0])
    @EVERY
    def test_a_teacher_whose_logits_are_far_from_zero(self, name: str, level: float) -> None:
        """All logits are exact in fp32, and so are their differences."""
        torch.manual_seed(0)
        z, y = torch.randint(-80, 81, (2, 20, 300)) / 16
        c, upstream = case_of_logits(z, y + level), torch.randn(20)
        out = c.run(DIVERGENCES[name])
        out.divergence.backward(upstream)
        expected, dx, _ = c.truth(DIVERGENCES[name], upstream)
        assert ((out.divergence.detach() / expected.divergence) - 1).abs().max() < 2e-6
        assert relative_error(c.hidden.grad, dx) < 2e-6

    @EVERY
    def test_a_probability_that_underflows_is_not_0(self, name: str) -> None:
        """exp(-300) is 0 in fp32; its logarithm is not."""
        torch.manual_seed(0)
        z, y = torch.randn(2, 12, 40) * 100
        c, upstream = case_of_logits(z, y), torch.randn(12)
        out = c.run(DIVERGENCES[name])
        out.divergence.backward(upstream)
        expected, dx, _ = c.truth(DIVERGENCES[name], upstream)
        torch.testing.assert_close(out.divergence.double(), expected.divergence, rtol=1e-5, atol=1e-6)
        # log p - log q is some 100 here.
        torch.testing.assert_close(c.hidden.grad.double(), dx, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("name", ["forward", "jsd of 0.1", "jsd of 0.9"])
    def test_what_the_teacher_finds_impossible(self, name: str) -> None:
        """A teacher's logit of minus infinity: finite but for the reverse KL."""
        c, upstream, expected, dx = self.impossible("teacher", name)
        out = c.run(DIVERGENCES[name], labels=c.labels)
        out.divergence.backward(upstream)
        torch.testing.assert_close(out.divergence.double(), expected, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(c.hidden.grad.double(), dx, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("name", ["reverse", "jsd of 0.1", "jsd of 0.9"])
    def test_what_the_student_finds_impossible(self, name: str) -> None:
        c, upstream, expected, _ = self.impossible("student", name)
        out = c.run(DIVERGENCES[name], labels=c.labels)
        torch.testing.assert_close(out.divergence.double(), expected, rtol=1e-5, atol=1e-7)
        torch.autograd.backward(out[:2], [upstream, torch.zeros(10)])
        # The infinite weight of the impossible word makes dX NaN, and nothing else does.
        assert c.weight.grad.isfinite().all()

    @EVERY
    def test_what_both_find_impossible(self, name: str) -> None:
        c, upstream, expected, _ = self.impossible("both", name)
        out = c.run(DIVERGENCES[name], labels=c.labels)
        out.divergence.backward(upstream)
        torch.testing.assert_close(out.divergence.double(), expected, rtol=1e-5, atol=1e-7)
        assert c.weight.grad.isfinite().all()

    @pytest.mark.parametrize(("who", "name"), [("teacher", "reverse"), ("student", "forward")])
    def test_an_infinite_divergence_is_infinite(self, who: str, name: str) -> None:
        c, *_ = self.impossible(who, name)
        assert (c.run(DIVERGENCES[name], labels=c.labels).divergence == math.inf).all()

    @staticmethod
    def impossible(who: str, name: str) -> tuple[Case, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Word 9 has a logit of minus infinity, of one model or of both; with the value, and dX where it is finite."""
        torch.manual_seed(0)
        c = Case(
            hidden=torch.randn(10, 8), weight=torch.randn(300, 8), teacher_hidden=torch.randn(10, 8),
            teacher_weight=torch.randn(300, 8), labels=torch.zeros(10, dtype=torch.long), vocab=300,
        )  # fmt: skip
        for hidden, weight, of in (
            (c.hidden, c.weight, ("student", "both")),
            (c.teacher_hidden, c.teacher_weight, ("teacher", "both")),
        ):
            if who in of:
                hidden[:, 0] = -hidden[:, 0].abs() - 1
                weight[9], weight[9, 0] = 0, math.inf
        c = c.copy()
        x, upstream = c.hidden.detach().double().requires_grad_(), torch.randn(10)
        z, y = x @ c.weight.detach().double().t(), c.teacher_hidden.double() @ c.teacher_weight.double().t()
        log_p, log_q = z.log_softmax(1), y.log_softmax(1)
        divergence = DIVERGENCES[name]
        p, q = log_p.exp(), log_q.exp()
        m = divergence.beta * q + (1 - divergence.beta) * p

        def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            """Of probabilities; terms without a probability are left out before autograd sees them."""
            there = a != 0
            safe = torch.where(there, a, 1.0)
            return torch.where(there, safe * (safe.log() - torch.where(there, b, 1.0).log()), 0.0).sum(1)

        value = divergence.forward * kl(q, p) if divergence.forward else torch.zeros(10, dtype=torch.float64)
        if divergence.reverse:
            value = value + divergence.reverse * kl(p, q)
        if divergence.jsd:
            mixed = divergence.beta * kl(q, m) + (1 - divergence.beta) * kl(p, m)
            value = value + divergence.jsd * mixed
        value.backward(upstream.double())
        assert x.grad is not None
        return c, upstream, value.detach(), x.grad
