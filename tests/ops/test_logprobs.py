"""Log-probs, entropy and their gradients against float64, on the CPU; and the flaws of others."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import LogitsTransform, VocabParallel, linear_logprobs
from megatron_fp32.ops.logprobs.statistics import KeptLogits
from tests.ops.logprobs_cases import (
    BENT,
    HIDDEN,
    PADDED,
    ROWS,
    TOKENS,
    VOCAB,
    Case,
    case,
    grouped,
    rounded_error,
    with_main_grad,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# What is lost in fp32: elementwise operations of an error of 2^-24 each, on sums of a few hundred terms.
FP32 = 1e-6


def upstreams(count: int = 4, tokens: int = TOKENS) -> list[torch.Tensor]:
    return list(torch.randn(count, tokens))


class TestAgainstFloat64:
    @pytest.mark.parametrize("options", [{"vocab_size": VOCAB}, BENT], ids=["plain", "bent"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_outputs(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        c = case(dtype)
        out = linear_logprobs(c.hidden, c.weight, c.labels, mean_logit=True, **grouped(options))
        truth, _, _ = c.truth(**options)
        for name, value, exact in zip(out._fields[:4], out[:4], truth[1:], strict=True):
            assert value is not None
            assert value.dtype == torch.float32, name
            assert relative_error(value.detach(), exact) < FP32, name

    @pytest.mark.parametrize("chunk_size", [None, 64])
    @pytest.mark.parametrize("backward", ["recompute", "saved"])
    @pytest.mark.parametrize("options", [{"vocab_size": VOCAB}, BENT], ids=["plain", "bent"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gradients(self, dtype: torch.dtype, options: Any, backward: Any, chunk_size: int | None) -> None:
        c, upstream = case(dtype), upstreams()
        out = linear_logprobs(
            c.hidden, c.weight, c.labels, mean_logit=True, grad_precision="bf16x3", backward=backward,
            chunk_size=chunk_size, **grouped(options),
        )  # fmt: skip
        torch.autograd.backward(out[:4], upstream)
        _, dx, dw = c.truth(upstream, **options)
        assert relative_error(c.hidden.grad, dx) < 1.05 * rounded_error(dx, dtype) + 2 * FP32
        assert relative_error(c.weight.grad, dw) < 1.05 * rounded_error(dw, dtype) + 2 * FP32

    @pytest.mark.parametrize("which", range(4))
    def test_each_output_alone(self, which: int) -> None:
        c, upstream = case(torch.float32), [torch.zeros(TOKENS)] * 4
        upstream[which] = torch.randn(TOKENS)
        out = linear_logprobs(c.hidden, c.weight, c.labels, mean_logit=True, **grouped(BENT))
        (out[which] * upstream[which]).sum().backward()
        _, dx, dw = c.truth(upstream, **BENT)
        assert relative_error(c.hidden.grad, dx) < 2 * FP32
        assert relative_error(c.weight.grad, dw) < 2 * FP32

    @pytest.mark.parametrize(("precision", "bound"), [("bf16", 4e-3), ("bf16x2", 2e-5), ("bf16x3", FP32)])
    def test_precision_of_the_gradient(self, precision: Any, bound: float) -> None:
        """An fp32 residual stream and main_grad show what dY lost."""
        c, upstream = case(), upstreams(2)
        wide = c.hidden.detach().float().requires_grad_()
        out = linear_logprobs(wide, with_main_grad(c.weight), c.labels, grad_precision=precision, vocab_parallel=PADDED)
        torch.autograd.backward(out[:2], upstream)
        _, dx, dw = c.truth(upstream, vocab_size=VOCAB)
        assert bound / 30 < relative_error(wide.grad, dx) < bound
        assert bound / 30 < relative_error(c.weight.main_grad, dw) < bound

    @pytest.mark.parametrize("precision", ["bf16", "bf16x2", "bf16x3"])
    @pytest.mark.parametrize("kind", ["large", "small"])
    def test_float32_hidden_states_beyond_float16(self, kind: str, precision: Any) -> None:
        """An fp32 residual stream beside a float16 weight: dW must neither overflow nor vanish."""
        c, upstream = case(torch.float16), upstreams(1)
        hidden = c.hidden.detach().float() * (1 if kind == "large" else 1e-9)
        if kind == "large":
            # A unit that no token of the vocabulary looks at, so that the logits stay as they are.
            hidden[:, 0] = torch.randn(TOKENS) * 3e5
            with torch.no_grad():
                c.weight[:, 0] = 0
        hidden.requires_grad_()
        linear_logprobs(
            hidden, with_main_grad(c.weight), c.labels, grad_precision=precision, vocab_parallel=PADDED
        ).logprobs.backward(upstream[0])
        _, dx, dw = Case(hidden=hidden, weight=c.weight, labels=c.labels).truth(upstream, vocab_size=VOCAB)
        assert relative_error(c.weight.main_grad, dw) < 1e-3
        assert relative_error(c.weight.main_grad[:, 1:], dw[:, 1:]) < 1e-3
        assert relative_error(hidden.grad, dx) < 1e-3

    def test_a_temperature_for_every_token(self) -> None:
        c, upstream, temperature = case(torch.float32), upstreams(2), torch.rand(TOKENS) + 0.3
        out = linear_logprobs(c.hidden, c.weight, c.labels, temperature=temperature, vocab_parallel=PADDED)
        torch.autograd.backward(out[:2], upstream)
        truth, dx, _ = c.truth(upstream, temperature=temperature, vocab_size=VOCAB)
        assert relative_error(out.logprobs.detach(), truth.logprobs) < FP32
        assert relative_error(c.hidden.grad, dx) < 2 * FP32

    @given(
        tokens=st.integers(1, 70), hidden=st.integers(1, 40), rows=st.integers(1, 300), seed=st.integers(0, 1000),
        data=st.data(),
    )  # fmt: skip
    @settings(deadline=None, max_examples=25, derandomize=True)
    def test_any_shape(self, tokens: int, hidden: int, rows: int, seed: int, data: st.DataObject) -> None:
        torch.manual_seed(seed)
        vocab = data.draw(st.integers(1, rows))
        c = Case(
            hidden=torch.randn(tokens, hidden).requires_grad_(),
            weight=torch.randn(rows, hidden).requires_grad_(),
            labels=torch.randint(vocab, (tokens,)),
        )
        upstream = upstreams(2, tokens)
        out = linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=VocabParallel(vocab_size=vocab))
        torch.autograd.backward(out[:2], upstream)
        truth, dx, dw = c.truth(upstream, vocab_size=vocab)
        size = truth.logits.abs().max()
        assert (out.logprobs.detach() - truth.logprobs).abs().max() < 1e-6 * (1 + size)
        assert (c.hidden.grad - dx).abs().max() < 1e-5 * (1 + size) * max(u.abs().max() for u in upstream)
        assert (c.weight.grad - dw).abs().max() < 1e-4 * (1 + size)


class TestAdversarial:
    @pytest.mark.parametrize("gap", [8.0, 16.0, 30.0])
    def test_a_confident_model_keeps_its_digits(self, gap: float) -> None:
        """p of 0.9 to 1 - 1e-10: log p and dY of the label have an error relative to themselves."""
        hidden, vocab = 64, 512
        weight = torch.eye(vocab, hidden)
        c = Case(hidden=torch.zeros(3, hidden), weight=weight, labels=torch.tensor([0, 5, 63])).copy()
        with torch.no_grad():
            c.hidden[torch.arange(3), c.labels] = gap
        out = linear_logprobs(c.hidden, c.weight, c.labels)
        out.logprobs.sum().backward()
        # float64's own log_softmax has lost them at a gap of 30.
        others = (vocab - 1) * math.exp(-gap)
        assert ((out.logprobs.detach() / -math.log1p(others)) - 1).abs().max() < 1e-6
        own = c.hidden.grad[torch.arange(3), c.labels]
        assert (own / (others / (1 + others)) - 1).abs().max() < 1e-6

    @pytest.mark.parametrize("level", [-100.0, 1e4, -1e4])
    def test_logits_far_from_zero(self, level: float) -> None:
        torch.manual_seed(0)
        # The first hidden unit shifts all logits of a token alike, which changes nothing but the logsumexp.
        hidden = torch.cat([torch.full((20, 1), level), torch.randint(-8, 9, (20, 8)).float()], 1)
        weight = torch.cat([torch.ones(300, 1), torch.randint(-8, 9, (300, 8)) / 32], 1)
        c = Case(hidden=hidden, weight=weight, labels=torch.randint(300, (20,))).copy()
        out = linear_logprobs(c.hidden, c.weight, c.labels)
        out.logprobs.sum().backward()
        truth, dx, _ = c.truth([torch.ones(20)])
        assert relative_error(out.logprobs.detach(), truth.logprobs) < FP32
        assert relative_error(out.entropy.detach(), truth.entropy) < FP32
        assert relative_error(out.logsumexp.detach(), truth.logsumexp) < FP32
        assert relative_error(c.hidden.grad[:, 1:], dx[:, 1:]) < 2 * FP32

    @pytest.mark.parametrize("size", [4.0, 6.0, 8.0])
    def test_a_soft_cap_that_is_reached_keeps_its_derivative(self, size: float) -> None:
        torch.manual_seed(0)
        hidden, weight = torch.randn(8, 16), torch.randn(50, 16)
        weight = weight * (size * 5.0 / (hidden @ weight.t()).abs().max())
        c = Case(hidden=hidden, weight=weight, labels=(hidden @ weight.t()).argmax(1)).copy()
        linear_logprobs(
            c.hidden, c.weight, c.labels, logits_transform=LogitsTransform(softcap=5.0)
        ).logprobs.sum().backward()
        x = c.hidden.detach().double().requires_grad_()
        raw = x @ c.weight.detach().double().t()
        raw.retain_grad()
        # The derivative of float64's tanh cancels, too, but from 16 digits.
        logits = 5 * torch.tanh(raw / 5)
        logits.log_softmax(1).gather(1, c.labels[:, None]).sum().backward()
        assert relative_error(c.weight.grad, raw.grad.t() @ x.detach()) < 5e-6

    def test_poison_in_the_padding_reaches_nothing(self) -> None:
        c = case()
        clean, poisoned = c.copy(), c.copy()
        with torch.no_grad():
            clean.weight[VOCAB:] = 0
            poisoned.weight[VOCAB:] = torch.nan
        outs = []
        for each in (clean, poisoned):
            out = linear_logprobs(each.hidden, each.weight, each.labels, vocab_parallel=PADDED)
            (out.logprobs + out.entropy).sum().backward()
            outs.append(out)
        for a, b in zip(*outs, strict=True):
            assert a is None or torch.equal(a, b)
        assert torch.equal(clean.hidden.grad, poisoned.hidden.grad)
        assert torch.equal(clean.weight.grad, poisoned.weight.grad)
        assert not poisoned.weight.grad[VOCAB:].any()

    def test_ignored_labels_give_nothing_to_the_log_prob(self) -> None:
        c = case(torch.float32)
        c.labels[:] = -100
        out = linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED)
        assert not out.logprobs.any()
        out.logprobs.backward(torch.full((TOKENS,), torch.nan))
        assert not c.hidden.grad.any()
        assert not c.weight.grad.any()

    @pytest.mark.parametrize("label", [VOCAB, ROWS + 5, -1])
    def test_a_label_outside_of_the_vocabulary_is_nan(self, label: int) -> None:
        c = case(torch.float32)
        c.labels[11] = label
        out = linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED)
        assert out.logprobs.isnan().nonzero().tolist() == [[11]]
        torch.where(torch.arange(TOKENS) == 11, 0.0, out.logprobs).sum().backward(retain_graph=True)
        assert c.hidden.grad.isfinite().all(), "a token that is masked has no gradient to spoil"
        c.hidden.grad = None
        out.logprobs.sum().backward()
        assert c.hidden.grad.isnan().any(1).nonzero().tolist() == [[11]]
        assert c.weight.grad.isnan().any()

    def test_nan_and_infinite_logits_do_not_hide(self) -> None:
        c = case(torch.float32)
        with torch.no_grad():
            c.hidden[4, 0], c.hidden[9, 0] = torch.nan, torch.inf
        out = linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED)
        assert out.logprobs.isfinite().logical_not().nonzero().flatten().tolist() == [4, 9]

    def test_no_tokens(self) -> None:
        c = Case(
            hidden=torch.zeros(0, 4, 8), weight=torch.randn(30, 8), labels=torch.zeros(0, 4, dtype=torch.long)
        ).copy()
        out = linear_logprobs(c.hidden, c.weight, c.labels)
        out.logprobs.sum().backward()
        assert out.logprobs.shape == (0, 4)
        assert c.hidden.grad.shape == (0, 4, 8)
        assert not c.weight.grad.any()


class TestAutograd:
    def test_shapes_and_a_non_contiguous_upstream(self) -> None:
        c = case(torch.float32)
        hidden = c.hidden.detach().view(50, 3, HIDDEN).transpose(0, 1).requires_grad_()
        labels = c.labels.view(50, 3).t()
        out = linear_logprobs(hidden, c.weight, labels, vocab_parallel=PADDED)
        assert out.logprobs.shape == out.entropy.shape == labels.shape
        upstream = torch.randn(50, 3)
        out.logprobs.backward(upstream.t())
        _, dx, _ = c.truth([upstream.reshape(-1)], vocab_size=VOCAB)
        assert relative_error(hidden.grad.transpose(0, 1).reshape(TOKENS, HIDDEN), dx) < 2 * FP32

    @pytest.mark.parametrize("output", ["logprobs", "entropy", "logsumexp"])
    def test_a_gradient_penalty_is_refused(self, output: str) -> None:
        """Its terms would be lost: the gradient of a sum has a constant upstream."""
        c = case(torch.float32)
        loss = getattr(linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED), output).sum()
        (grad,) = torch.autograd.grad(loss, c.hidden, create_graph=True)
        upstream = [torch.ones(TOKENS) * (output == name) for name in ("logprobs", "entropy", "logsumexp")]
        _, dx, _ = c.truth(upstream, vocab_size=VOCAB)
        assert relative_error(grad.detach(), dx) < 2 * FP32
        with pytest.raises(RuntimeError, match="first derivatives only"):
            (loss + 10 * grad.square().sum()).backward()

    @pytest.mark.parametrize("backward", ["recompute", "saved"])
    def test_a_second_backward_pass_gives_the_same(self, backward: Any) -> None:
        c = case()
        out = linear_logprobs(c.hidden, c.weight, c.labels, backward=backward, vocab_parallel=PADDED)
        first = torch.autograd.grad(out.logprobs.sum(), (c.hidden, c.weight), retain_graph=True)
        second = torch.autograd.grad(out.logprobs.sum(), (c.hidden, c.weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_changing_an_output_in_place_changes_no_gradient(self) -> None:
        c = case(torch.float32)
        _, dx, _ = c.truth([torch.ones(TOKENS)], vocab_size=VOCAB)
        out = linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED)
        with torch.no_grad():
            out.entropy.fill_(torch.nan)
            out.logsumexp.fill_(torch.nan)
        out.logprobs.div_(2).mul(2).sum().backward()
        assert relative_error(c.hidden.grad, dx) < 2 * FP32

    def test_main_grad_accumulates_over_micro_batches(self) -> None:
        total = torch.zeros(ROWS, HIDDEN, dtype=torch.float64)
        weight = with_main_grad(case().weight)
        for seed in range(3):
            c, upstream = case(seed=seed), upstreams(1)
            c.weight = weight
            linear_logprobs(
                c.hidden, weight, c.labels, grad_precision="bf16x3", vocab_parallel=PADDED
            ).logprobs.backward(upstream[0])
            total += c.truth(upstream, vocab_size=VOCAB)[2]
        assert weight.grad_added_to_main_grad
        assert relative_error(weight.main_grad, total) < FP32

    def test_dw_over_chunks_is_rounded_once(self) -> None:
        """Added up in bfloat16, 75 chunks of 2 tokens lose 5 times as much as one rounding."""
        c, upstream = case(), upstreams(1)
        out = linear_logprobs(
            c.hidden, c.weight, c.labels, grad_precision="bf16x3", chunk_size=2, vocab_parallel=PADDED
        )
        out.logprobs.backward(upstream[0])
        _, _, dw = c.truth(upstream, vocab_size=VOCAB)
        assert relative_error(c.weight.grad, dw) < 1.05 * rounded_error(dw, torch.bfloat16)

    def test_frozen_weight_and_frozen_hidden(self) -> None:
        c = case(torch.float32)
        _, dx, dw = c.truth([torch.ones(TOKENS)], vocab_size=VOCAB)
        linear_logprobs(c.hidden, c.weight.detach(), c.labels, vocab_parallel=PADDED).logprobs.sum().backward()
        linear_logprobs(c.hidden.detach(), c.weight, c.labels, vocab_parallel=PADDED).logprobs.sum().backward()
        assert relative_error(c.hidden.grad, dx) < 2 * FP32
        assert relative_error(c.weight.grad, dw) < 2 * FP32

    def test_activation_recompute(self) -> None:
        c = case()
        again = c.copy()
        out = torch.utils.checkpoint.checkpoint(
            lambda h: linear_logprobs(h, c.weight, c.labels, vocab_parallel=PADDED).logprobs,
            c.hidden,
            use_reentrant=False,
        )
        out.sum().backward()
        linear_logprobs(again.hidden, again.weight, again.labels, vocab_parallel=PADDED).logprobs.sum().backward()
        assert torch.equal(c.hidden.grad, again.hidden.grad)
        assert torch.equal(c.weight.grad, again.weight.grad)

    def test_saved_logits_are_for_a_backward_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        c = case()
        monkeypatch.setattr(KeptLogits, "allocate", None)
        with torch.no_grad():
            linear_logprobs(c.hidden, c.weight, c.labels, backward="saved", vocab_parallel=PADDED)
        with pytest.raises(TypeError):
            linear_logprobs(c.hidden, c.weight, c.labels, backward="saved", vocab_parallel=PADDED)

    def test_the_default_dtype_changes_nothing(self) -> None:
        c = case(torch.float32)
        torch.set_default_dtype(torch.float64)
        try:
            out = linear_logprobs(c.hidden, c.weight, c.labels, top_k=2, vocab_parallel=PADDED)
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(x is None or x.dtype in (torch.float32, torch.int64) for x in out)

    def test_autocast_changes_nothing(self) -> None:
        c = case(torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED)
        assert torch.equal(out.logprobs, linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED).logprobs)
