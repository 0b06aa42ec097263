"""The head without logits on CUDA: kernels against float64 and their definitions, invariance, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import linear_logprobs, weighted_cross_entropy
from megatron_fp32.ops.logprobs.gradient import gradient_torch, gradient_vectors
from megatron_fp32.ops.logprobs.statistics import (
    block_statistics,
    combine,
    combine_torch,
    statistics_torch,
)
from megatron_fp32.ops.logprobs.tokens import token_statistics
from megatron_fp32.ops.products.fixed_order import fixed_order_product
from megatron_fp32.ops.products.shard import BLOCK
from tests.ops.logprobs_cases import BENT, PADDED, VOCAB, case, grouped, rounded_error, softmax, with_main_grad

pytestmark = pytest.mark.gpu

# A truncating accumulator over 96 terms, then exponentials of an error of 2^-22.
FP32 = 3e-6


@pytest.mark.parametrize("backward", ["recompute", "saved"])
@pytest.mark.parametrize("options", [{"vocab_size": VOCAB}, BENT], ids=["plain", "bent"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_outputs_and_gradients(dtype: torch.dtype, options: Any, backward: Any) -> None:
    c = case(dtype, device="cuda")
    upstream = list(torch.randn(4, len(c.labels), device="cuda"))
    for chunk_size in (None, 64):
        c.hidden.grad = c.weight.grad = None
        out = linear_logprobs(
            c.hidden, c.weight, c.labels, mean_logit=True, grad_precision="bf16x3", backward=backward,
            chunk_size=chunk_size, **grouped(options),
        )  # fmt: skip
        torch.autograd.backward(out[:4], upstream)
        truth, dx, dw = c.truth(upstream, **options)
        for name, value, exact in zip(out._fields[:4], out[:4], truth[1:], strict=True):
            assert relative_error(value.detach(), exact) < FP32, name
        assert relative_error(c.hidden.grad, dx) < 1.05 * rounded_error(dx, dtype) + 2 * FP32
        assert relative_error(c.weight.grad, dw) < 1.05 * rounded_error(dw, dtype) + 2 * FP32


@pytest.mark.parametrize("smooth", [{}, {"label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "smooth"])
@pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
def test_weighted_loss(precision: Any, smooth: dict[str, float]) -> None:
    """With bf16 gradients it keeps exponentials in float16: dY must not show it."""
    c = case(device="cuda")
    weights = torch.rand(len(c.labels), device="cuda")
    for chunk_size in (None, 64):
        c.hidden.grad = None
        with_main_grad(c.weight)
        out = weighted_cross_entropy(
            c.hidden, c.weight, c.labels, weights, grad_precision=precision, grad_scale=0.5, chunk_size=chunk_size,
            vocab_parallel=PADDED, **smooth,
        )  # fmt: skip
        (out.total * 0.5).backward()
        x, w = c.hidden.detach().double().requires_grad_(), c.weight.detach().double().requires_grad_()
        z = (x @ w.t())[:, :VOCAB]
        z.retain_grad()
        losses = torch.nn.functional.cross_entropy(
            z, c.labels, reduction="none", label_smoothing=smooth.get("label_smoothing", 0.0)
        ) + smooth.get("z_loss", 0.0) * z.logsumexp(1).square() * (c.labels != -100)
        (0.5 * (losses * weights).sum()).backward()
        assert relative_error(out.losses, losses.detach()) < FP32
        if precision == "bf16x2":
            assert relative_error(c.weight.main_grad, w.grad) < 3e-5
            continue
        low = z.grad.bfloat16().double()
        assert relative_error(c.weight.main_grad, w.grad) < 1.1 * relative_error(low.t() @ x, w.grad[:VOCAB])
        rounded = (low @ w[:VOCAB]).bfloat16()
        assert relative_error(c.hidden.grad, x.grad) < 1.1 * relative_error(rounded, x.grad)


class TestKernels:
    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_statistics(self, softcap: float | None) -> None:
        from megatron_fp32.ops.logprobs.kernels import combine_triton, statistics_triton

        raw = torch.randn(150, ROWS := 700, device="cuda") * 4
        labels = torch.randint(VOCAB, (150,), device="cuda").int()
        inverse_temperature = torch.rand(150, device="cuda") + 0.5
        part = softmax(ROWS, valid_columns=VOCAB, scale=1.1, softcap=softcap)
        results = []
        for function in (statistics_triton, statistics_torch):
            statistics = torch.full((6, 4, 150), torch.nan, device="cuda")
            label_logits = torch.zeros(150, device="cuda")
            function(raw, labels, inverse_temperature, part, statistics, label_logits)
            results.append((statistics, label_logits))
        (a, a_label), (b, b_label) = results
        torch.testing.assert_close(a_label, b_label, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-4)
        torch.testing.assert_close(combine_triton(a), combine_torch(a), rtol=3e-6, atol=1e-4)

    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("softcap", [None, 5.0])
    def test_gradient(self, softcap: float | None, count: int) -> None:
        from megatron_fp32.ops.logprobs.kernels import gradient_triton

        c = case(device="cuda")
        part = softmax(700, valid_columns=VOCAB, vocab_size=VOCAB, scale=1.1, softcap=softcap)
        inverse_temperature = torch.rand(150, device="cuda") + 0.5
        x, w = c.hidden.detach(), c.weight.detach()
        statistics = token_statistics(x, w, c.labels, inverse_temperature, part, mean="logit")
        g = torch.randn(4, 150, device="cuda")
        vectors = gradient_vectors(
            statistics,
            inverse_temperature,
            part,
            c.labels,
            logprob=g[0],
            entropy=g[1],
            logsumexp=g[2],
            mean=g[3],
            mean_of="logit",
        )
        raw, labels = fp32_logits(x, w), part.shard.local_labels(c.labels)
        got = gradient_triton(raw[:, 128:500], vectors, labels, part, 128, count, torch.bfloat16, None)
        expected = gradient_torch(raw[:, 128:500], vectors, labels, part, 128, count, torch.bfloat16, None)
        a, b = (sum(piece.float() for piece in pieces) for pieces in (got, expected))
        assert relative_error(a, b) < 2.0 ** (-8 * count) + 2e-6


class TestInvariance:
    def test_a_token_is_the_same_in_every_batch(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(1000, 512, device="cuda").bfloat16()
        w = (torch.randn(5000, 512, device="cuda") / 8).bfloat16()
        y = torch.randint(5000, (1000,), device="cuda")
        whole = linear_logprobs(x, w, y, invariant=True)
        logits = fixed_order_product(x, w, torch.empty(1000, 5000, device="cuda"))
        for start, stop in ((0, 1), (999, 1000), (500, 507), (100, 228), (37, 938)):
            rows = slice(start, stop)
            part = linear_logprobs(x[rows], w, y[rows], invariant=True)
            for a, b in zip(part, whole, strict=True):
                assert a is None or torch.equal(a, b[rows])
            out = torch.empty(stop - start, 5000, device="cuda")
            assert torch.equal(fixed_order_product(x[rows], w, out), logits[rows])

    @pytest.mark.parametrize("precision", ["bf16", "bf16x2", "bf16x3"])
    @pytest.mark.parametrize("operator", ["recompute", "saved", "weighted"])
    def test_the_gradient_of_a_token_is_the_same_in_every_batch(self, operator: Any, precision: Any) -> None:
        torch.manual_seed(0)
        x = torch.randn(600, 520, device="cuda").bfloat16()
        w = (torch.randn(40003, 520, device="cuda") / 8).bfloat16()
        y = torch.randint(40003, (600,), device="cuda")
        g = torch.rand(600, device="cuda")

        def hidden_grad(rows: slice, invariant: bool = True) -> torch.Tensor:
            leaf = x[rows].clone().requires_grad_()
            options: dict[str, Any] = {"grad_precision": precision, "invariant": invariant}
            if operator == "weighted":
                weighted_cross_entropy(leaf, w, y[rows], g[rows], **options).total.backward()
            else:
                linear_logprobs(leaf, w, y[rows], backward=operator, **options).logprobs.backward(g[rows])
            return leaf.grad

        whole = hidden_grad(slice(None))
        assert relative_error(whole, hidden_grad(slice(None), invariant=False)) < 3e-3
        for rows in (slice(0, 1), slice(599, 600), slice(37, 300)):
            assert torch.equal(hidden_grad(rows), whole[rows])

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_the_chain_of_sums_can_be_interrupted(self, count: int) -> None:
        from megatron_fp32.ops.products.hidden_grad_triton import add_hidden_grad

        torch.manual_seed(0)
        w = (torch.randn(9003, 520, device="cuda") / 8).bfloat16()
        grads = tuple((torch.randn(300, 9003, device="cuda") * 2.0 ** (-8 * i)).bfloat16() for i in range(count))
        whole, chained = torch.full((2, 300, 520), torch.nan, device="cuda")
        add_hidden_grad(whole, grads, w, begin=True)
        assert relative_error(whole, sum(g.double() for g in grads) @ w.double()) < 2**-14
        for first, last in ((0, 128), (128, 4096), (4096, 9003)):
            add_hidden_grad(chained, tuple(g[:, first:last] for g in grads), w[first:last], begin=first == 0)
        assert torch.equal(chained, whole)

    @pytest.mark.parametrize("vocab", [151936, 129280, 128256, 248320])
    def test_any_sharding_under_megatrons_padding(self, vocab: int) -> None:
        """What each rank would compute, put together as the ranks do."""
        torch.manual_seed(0)
        x = torch.randn(64, 256, device="cuda").bfloat16()
        rows = torch.randn(vocab, 256, device="cuda").bfloat16()
        y = torch.randint(vocab, (64,), device="cuda")
        inverse_temperature = torch.ones(64, device="cuda")
        results = []
        for ranks in (1, 2, 4, 8):
            padded = -(-vocab // (128 * ranks)) * 128 * ranks
            w = torch.cat([rows, torch.full((padded - vocab, 256), 7.0, device="cuda").bfloat16()])
            columns = padded // ranks
            parts = []
            for rank in range(ranks):
                first = rank * columns
                part = softmax(columns, first_column=first, valid_columns=min(max(vocab - first, 0), columns))
                parts.append(
                    block_statistics(
                        x,
                        w[first : first + columns],
                        part.shard.local_labels(y),
                        inverse_temperature,
                        part,
                        mean="logit",
                        keep=None,
                    )
                )
            statistics = combine(torch.cat([statistics for statistics, _ in parts]))
            results.append((statistics, torch.stack([label for _, label in parts]).sum(0)))
        for statistics, label in results[1:]:
            assert torch.equal(statistics, results[0][0])
            assert torch.equal(label, results[0][1])

    def test_the_last_tile_writes_nothing_beyond_its_blocks(self) -> None:
        """An odd number of blocks: the last tile is two blocks wide."""
        from megatron_fp32.ops.products.project_triton import project_triton

        x = torch.randn(64, 256, device="cuda").bfloat16()
        w = torch.randn(3 * BLOCK, 256, device="cuda").bfloat16()
        room = torch.full((4, 3, 64), torch.nan, device="cuda")
        project_triton(
            x, w, statistics=room[:3], labels=torch.zeros(64, device="cuda").int(),
            label_logits=torch.zeros(64, device="cuda"), inverse_temperature=torch.ones(64, device="cuda"),
            valid_columns=len(w),
        )  # fmt: skip
        assert room[:3].isfinite().all()
        assert room[3].isnan().all()


class TestMemory:
    """At T=8192, H=4096, V=151936 the logits would take 4.6 GiB."""

    TOKENS, HIDDEN, VOCAB = 8192, 4096, 151936

    @pytest.fixture(scope="class")
    def operands(self) -> Any:
        torch.manual_seed(0)
        x = torch.randn(self.TOKENS, self.HIDDEN, device="cuda").bfloat16().requires_grad_()
        w = (torch.randn(self.VOCAB, self.HIDDEN, device="cuda") / 64).bfloat16().requires_grad_()
        y = torch.randint(self.VOCAB, (self.TOKENS,), device="cuda")
        # cuBLAS' workspace belongs to the process.
        torch.mm(x.detach()[:64], x.detach()[:64].t(), out_dtype=torch.float32)
        return x, with_main_grad(w), y

    def peak(self, way: Any) -> float:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def test_forward(self, operands: Any) -> None:
        x, w, y = operands
        with torch.no_grad():
            assert self.peak(lambda: linear_logprobs(x, w, y)) < 1.3
            assert self.peak(lambda: linear_logprobs(x, w, y, invariant=True)) < 1.3

    @pytest.mark.parametrize("precision", ["bf16", "bf16x2", "bf16x3"])
    def test_recompute(self, operands: Any, precision: Any) -> None:
        x, w, y = operands
        assert self.peak(lambda: linear_logprobs(x, w, y, grad_precision=precision).logprobs.sum().backward()) < 1.3
        x.grad = None

    @pytest.mark.parametrize("precision", ["bf16", "bf16x2", "bf16x3"])
    def test_weighted(self, operands: Any, precision: Any) -> None:
        x, w, y = operands
        weights = torch.ones(self.TOKENS, device="cuda")
        way = lambda: weighted_cross_entropy(x, w, y, weights, grad_precision=precision).total.backward()  # noqa: E731
        assert self.peak(way) < 1.3
        x.grad = None
