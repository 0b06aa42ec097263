"""`linear_distillation`: tokens that do not count, what autograd sees, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import VocabParallel, workspace
from megatron_fp32.ops.logprobs.distillation import linear_distillation
from megatron_fp32.ops.logprobs.divergence import Divergence
from tests.ops.distillation_cases import (
    DIVERGENCES,
    HIDDEN,
    ROWS,
    TEACHER_HIDDEN,
    TOKENS,
    VOCAB,
    Case,
    case,
)
from tests.ops.logprobs_cases import rounded_error, with_main_grad

PADDED = VocabParallel(vocab_size=VOCAB)
ALL = DIVERGENCES["all"]
# What is lost in fp32: products of 96 terms, then exponentials of logits of up to 12.
FP32 = 3e-6
EVERY = pytest.mark.parametrize("name", DIVERGENCES)


class TestTokensThatDoNotCount:
    MASKED = [0, 5, 64, 69]

    def spoiled(self, how: str, dtype: torch.dtype) -> tuple[Case, Case, dict[str, Any]]:
        """The same tokens masked twice: with what is harmless, and with NaN in all that belongs to them."""
        clean, dirty = case(dtype), case(dtype)
        mask = torch.ones(TOKENS, dtype=torch.bool)
        options: dict[str, Any] = {"labels": clean.labels}
        if how == "labels":
            clean.labels[self.MASKED] = dirty.labels[self.MASKED] = -100
        else:
            mask[self.MASKED] = False
            options["mask"] = mask
        for c in (clean, dirty):
            c.hidden = c.hidden.detach()
            if dtype == torch.float16:
                # An fp32 residual stream, whose pieces share a scale.
                c.hidden, c.teacher_hidden = c.hidden.float(), c.teacher_hidden.float()
        dirty.hidden[0], dirty.hidden[5], dirty.hidden[64] = math.nan, math.inf, 3e38
        dirty.teacher_hidden[5], dirty.teacher_hidden[69] = math.nan, 3e38
        return clean.copy(), dirty.copy(), options

    @pytest.mark.parametrize("precision", ["bf16", "bf16x3"])
    @pytest.mark.parametrize("how", ["labels", "mask"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_they_touch_nothing(self, dtype: torch.dtype, how: str, precision: Any) -> None:
        clean, dirty, options = self.spoiled(how, dtype)
        results = []
        for c in (clean, dirty):
            temperature, upstream = (
                torch.rand(TOKENS, generator=torch.Generator().manual_seed(0)) + 0.5,
                torch.ones(2, 70),
            )
            if c is dirty:
                temperature[self.MASKED] = torch.tensor([0.0, math.nan, -1.0, math.inf])
                upstream[:, self.MASKED] = torch.tensor([math.nan, math.inf, 0.0, -1.0])
                options["labels"] = torch.where(c.labels == -100, -100, c.labels)
                if how == "mask":
                    options["labels"][self.MASKED[:2]] = VOCAB + 3
            out = c.run(
                ALL, vocab_parallel=PADDED, temperature=temperature, label_temperature=temperature.clone(),
                grad_precision=precision, **options,
            )  # fmt: skip
            torch.autograd.backward(out[:2], list(upstream))
            results.append(([x.detach() for x in out], c.hidden.grad, c.weight.grad))
        (outputs, dx, dw), (spoiled, spoiled_dx, spoiled_dw) = results
        for a, b in zip(outputs, spoiled, strict=True):
            assert torch.equal(a, b)
            assert not b[self.MASKED].any()
            assert not b[self.MASKED].signbit().any()
        assert torch.equal(dx, spoiled_dx)
        assert torch.equal(dw, spoiled_dw)
        assert not dx[self.MASKED].any()
        assert dw.isfinite().all()

    @pytest.mark.parametrize("model", ["hidden", "teacher_hidden"])
    @EVERY
    def test_a_nan_stays_with_its_token(self, name: str, model: str) -> None:
        clean, dirty = case(), case()
        with torch.no_grad():
            getattr(dirty, model)[11, 2] = math.nan
        results = []
        for c in (clean, dirty):
            out = c.run(DIVERGENCES[name], labels=c.labels, vocab_parallel=PADDED)
            (out.divergence + out.logprobs).sum().backward()
            results.append((out, c.hidden.grad))
        (a, dx), (b, other) = results
        assert b.divergence[11].isnan()
        assert b.logprobs is not None
        assert b.logprobs[11].isnan() == (model == "hidden")
        rest = torch.arange(TOKENS) != 11
        assert all(torch.equal(u[rest], v[rest]) for u, v in zip(a, b, strict=True))
        assert torch.equal(dx[rest], other[rest])
        assert other[11].isnan().all()

    def test_upstream_gradients_of_0(self) -> None:
        """A NaN teacher spoils no log-prob, an impossible label no divergence; where both are 0 nothing is spoiled."""
        c, upstream = case(), torch.randn(2, TOKENS)
        c.teacher_hidden[11], c.teacher_hidden[13] = math.nan, math.nan
        c.labels[12], c.labels[14] = VOCAB + 5, -1
        upstream[0, [11, 13]] = 0
        upstream[1, [12, 13, 14]] = 0
        out = c.run(ALL, labels=c.labels, vocab_parallel=PADDED)
        torch.autograd.backward(out[:2], list(upstream))
        assert out.divergence.isnan().nonzero().flatten().tolist() == [11, 13]
        assert out.logprobs is not None
        assert out.logprobs.isnan().nonzero().flatten().tolist() == [12, 14]
        assert not c.hidden.grad[13].any()
        well = case()
        well.labels = c.labels.clamp(0, VOCAB - 1)
        well.labels[3] = -100
        _, dx, dw = well.truth(ALL, *upstream)
        assert relative_error(c.hidden.grad, dx) < 3 * FP32
        assert relative_error(c.weight.grad, dw) < 3 * FP32

    def test_poison_in_the_padding_reaches_nothing(self) -> None:
        results = []
        for poison in (0.0, math.nan, math.inf):
            c = case()
            with torch.no_grad():
                c.weight[VOCAB:] = poison
                c.teacher_weight[VOCAB:] = -poison
            out = c.run(ALL, labels=c.labels, vocab_parallel=PADDED)
            (out.divergence + out.logprobs).sum().backward()
            results.append((*out, c.hidden.grad, c.weight.grad))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        assert not results[1][-1][VOCAB:].any()


class TestAutograd:
    def test_shapes_and_strides(self) -> None:
        c, upstream = case(), torch.randn(10, 7)
        hidden = c.hidden.detach().view(7, 10, HIDDEN).transpose(0, 1).requires_grad_()
        teacher = c.teacher_hidden.view(7, 10, TEACHER_HIDDEN).transpose(0, 1)
        labels = c.labels.view(7, 10).t().int()
        weight = torch.randn(HIDDEN, ROWS).t().copy_(c.weight.detach()).requires_grad_()
        out = linear_distillation(
            hidden, weight, teacher, c.teacher_weight, divergence=ALL, labels=labels, vocab_parallel=PADDED
        )
        assert all(x is not None and x.shape == (10, 7) for x in out)
        out.divergence.backward(upstream)
        _, dx, dw = c.truth(ALL, upstream.t().reshape(-1))
        assert relative_error(hidden.grad.transpose(0, 1).reshape(TOKENS, HIDDEN), dx) < 3 * FP32
        assert relative_error(weight.grad, dw) < 3 * FP32

    @pytest.mark.parametrize("chunk_size", [1, 16, 69, 70, 1000])
    def test_chunks_change_nothing_but_the_order(self, chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        c, upstream = case(), torch.randn(2, TOKENS)
        monkeypatch.setattr(workspace, "BYTES", 2**18)
        out = c.run(ALL, labels=c.labels, vocab_parallel=PADDED, chunk_size=chunk_size)
        torch.autograd.backward(out[:2], list(upstream))
        expected, dx, dw = c.truth(ALL, *upstream)
        assert all(relative_error(a.detach(), b) < FP32 for a, b in zip(out, expected, strict=True) if a is not None)
        assert relative_error(c.hidden.grad, dx) < 3 * FP32
        assert relative_error(c.weight.grad, dw) < 3 * FP32

    def test_dw_over_chunks_is_rounded_once(self) -> None:
        c, upstream = case(torch.bfloat16), torch.randn(TOKENS)
        out = c.run(ALL, labels=c.labels, vocab_parallel=PADDED, chunk_size=2, grad_precision="bf16x3")
        out.divergence.backward(upstream)
        _, _, dw = c.truth(ALL, upstream)
        assert relative_error(c.weight.grad, dw) < 1.05 * rounded_error(dw, torch.bfloat16)

    def test_no_tokens(self) -> None:
        c = Case(
            hidden=torch.zeros(0, 4, 8), weight=torch.randn(30, 8), teacher_hidden=torch.zeros(0, 4, 5),
            teacher_weight=torch.randn(30, 5), labels=torch.zeros(0, 4, dtype=torch.long),
        ).copy()  # fmt: skip
        out = c.run(ALL, labels=c.labels)
        (out.divergence + out.logprobs).sum().backward()
        assert all(x is not None and x.shape == (0, 4) for x in out)
        assert c.hidden.grad.shape == (0, 4, 8)
        assert not c.weight.grad.any()

    def test_frozen_weight_and_frozen_hidden(self) -> None:
        c, upstream = case(), torch.randn(TOKENS)
        _, dx, dw = c.truth(ALL, upstream)
        teacher, options = (c.teacher_hidden, c.teacher_weight), {"divergence": ALL, "labels": c.labels}
        for operands in ((c.hidden, c.weight.detach()), (c.hidden.detach(), c.weight)):
            out = linear_distillation(*operands, *teacher, vocab_parallel=PADDED, **options)  # type: ignore[arg-type]
            out.divergence.backward(upstream)
        assert relative_error(c.hidden.grad, dx) < 3 * FP32
        assert relative_error(c.weight.grad, dw) < 3 * FP32

    def test_main_grad_accumulates_over_micro_batches(self) -> None:
        weight = with_main_grad(case(torch.bfloat16).weight)
        total = torch.zeros(ROWS, HIDDEN, dtype=torch.float64)
        for seed in range(3):
            c, upstream = case(torch.bfloat16, seed=seed), torch.randn(TOKENS)
            c.weight = weight
            out = c.run(ALL, labels=c.labels, vocab_parallel=PADDED, grad_precision="bf16x3")
            out.divergence.backward(upstream)
            total += c.truth(ALL, upstream)[2]
        assert weight.grad_added_to_main_grad
        assert relative_error(weight.main_grad, total) < FP32

    def test_a_second_backward_pass_gives_the_same(self) -> None:
        c = case()
        out = c.run(ALL, labels=c.labels, vocab_parallel=PADDED)
        loss = (out.divergence - out.logprobs).sum()
        first = torch.autograd.grad(loss, (c.hidden, c.weight), retain_graph=True)
        with torch.no_grad():
            for x in out:
                x.fill_(torch.nan)
        second = torch.autograd.grad(loss, (c.hidden, c.weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    @pytest.mark.parametrize("output", ["divergence", "logprobs"])
    def test_a_gradient_penalty_is_refused(self, output: str) -> None:
        c = case()
        loss = getattr(c.run(ALL, labels=c.labels, vocab_parallel=PADDED), output).sum()
        (grad,) = torch.autograd.grad(loss, c.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="first derivatives only"):
            (loss + grad.square().sum()).backward()

    def test_entropies_have_no_gradient(self) -> None:
        c = case()
        out = c.run(ALL, vocab_parallel=PADDED)
        assert out.divergence.requires_grad
        assert not out.entropy.requires_grad
        assert not out.teacher_entropy.requires_grad

    def test_nothing_of_the_size_of_the_logits_is_kept(self) -> None:
        c, kept = case(), []

        def keep(x: torch.Tensor) -> torch.Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            c.run(ALL, labels=c.labels, vocab_parallel=PADDED)
        assert max(kept) < TOKENS * ROWS + ROWS * HIDDEN
        assert sorted(kept)[-2:] == [ROWS * TEACHER_HIDDEN, ROWS * HIDDEN]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"teacher_hidden": torch.zeros(TOKENS, 3)}, "expected teacher_hidden"),
            ({"teacher_hidden": torch.zeros(TOKENS - 1, TEACHER_HIDDEN)}, "expected teacher_hidden"),
            ({"teacher_weight": torch.zeros(ROWS - 1, TEACHER_HIDDEN)}, "expected teacher_hidden"),
            ({"teacher_weight": torch.zeros(TEACHER_HIDDEN)}, "expected teacher_hidden"),
            ({"hidden": torch.zeros(TOKENS, 3)}, "expected hidden"),
            ({"teacher_hidden": torch.zeros(TOKENS, TEACHER_HIDDEN).requires_grad_()}, "the teacher gets no gradient"),
            ({"teacher_weight": torch.zeros(ROWS, TEACHER_HIDDEN).requires_grad_()}, "the teacher gets no gradient"),
            ({"mask": torch.ones(TOKENS - 1, dtype=torch.bool)}, r"expected a mask \(70,\), got \(69,\)"),
            ({"labels": torch.zeros(3, dtype=torch.long)}, r"expected labels \(70,\)"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"temperature": torch.ones(3)}, "labels' shape"),
            ({"label_temperature": 2.0}, "expected labels, got None"),
            ({"label_temperature": torch.ones(TOKENS)}, "expected labels, got None"),
            ({"chunk_size": 0}, "chunk_size must be at least 1"),
            ({"grad_precision": "fp8"}, "grad_precision must be one of"),
            ({"vocab_parallel": VocabParallel(vocab_size=701)}, "vocab_size must be 1 to 700"),
        ],
    )
    def test_values(self, changes: dict[str, Any], message: str) -> None:
        c = case()
        operands = {name: getattr(c, name) for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")}
        with pytest.raises(ValueError, match=message):
            linear_distillation(**{"divergence": ALL, **operands, **changes})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"divergence": "forward"}, "divergence must be a Divergence, got 'forward'"),
            ({"mask": torch.ones(TOKENS)}, r"mask must be a bool tensor or None, got torch\.float32"),
            ({"labels": torch.zeros(TOKENS)}, "labels must be int64 or int32"),
            (
                {"teacher_logits_transform": 5.0},
                r"teacher_logits_transform must be a LogitsTransform or None, got 5\.0",
            ),
            ({"logits_transform": 5.0}, r"logits_transform must be a LogitsTransform or None, got 5\.0"),
            ({"vocab_parallel": 5}, "vocab_parallel must be a VocabParallel or None, got 5"),
            ({"teacher_hidden": torch.zeros(TOKENS, TEACHER_HIDDEN).half()}, "teacher_hidden and teacher_weight must"),
            ({"temperature": "1"}, "temperature must be a number"),
        ],
    )
    def test_types(self, changes: dict[str, Any], message: str) -> None:
        c = case()
        operands = {name: getattr(c, name) for name in ("hidden", "weight", "teacher_hidden", "teacher_weight")}
        with pytest.raises(TypeError, match=message):
            linear_distillation(**{"divergence": ALL, **operands, **changes})

    def test_a_teacher_with_a_gradient_without_gradients(self) -> None:
        c = case()
        c.teacher_weight.requires_grad_()
        with torch.no_grad():
            assert c.run(ALL, vocab_parallel=PADDED).divergence.isfinite().all()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "a weight that is not 0"),
            ({"forward": -1.0}, "forward must not be negative"),
            ({"reverse": math.inf}, "reverse must be finite"),
            ({"jsd": math.nan}, "jsd must be finite"),
            ({"jsd": 1.0, "beta": 0.0}, "beta must be more than 0"),
            ({"jsd": 1.0, "beta": 1.0}, "less than 1"),
        ],
    )
    def test_divergences(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Divergence(**arguments)

    def test_alpha(self) -> None:
        with pytest.raises(ValueError, match="alpha must be 0 to 1"):
            Divergence.mixed_kl(1.5)
        assert Divergence.mixed_kl(1.0) == Divergence.forward_kl()
        assert Divergence.mixed_kl(0.0) == Divergence.reverse_kl()
