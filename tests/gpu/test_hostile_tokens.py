"""On CUDA: what NaN logits, masked tokens, impossible labels and temperatures touch; large offsets; a wrong scale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import linear_cross_entropy, linear_logprobs, weighted_cross_entropy, workspace
from megatron_fp32.ops.products.split import split_torch
from tests.ops.hostile_tokens import CHECKS, Head, heads
from tests.ops.logprobs_cases import PADDED, case, with_main_grad

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("head", heads("cuda"), ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_a_hostile_token_touches(check: Callable[[Head], None], head: Head) -> None:
    check(head)


def test_pieces_beyond_two_to_the_31st_element() -> None:
    """fp32 hidden states of 131072 tokens with a hidden size of 8192: the third piece begins at element 2^31."""
    from megatron_fp32.ops.products.split_triton import split_triton

    x = torch.randn(131072, 8192, device="cuda")
    parts = split_triton(x, 3, torch.bfloat16, None)
    for start in (0, 65536, 131008):
        rows = slice(start, start + 64)
        expected = split_torch(x[rows], 3, torch.bfloat16, None)
        assert all(torch.equal(a[rows], b) for a, b in zip(parts, expected, strict=True))


@pytest.mark.parametrize("level", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_smoothing_far_from_zero(dtype: torch.dtype, level: float) -> None:
    torch.manual_seed(0)
    hidden = torch.cat([torch.full((20, 1), level), torch.randint(-8, 9, (20, 15)).float()], 1).to("cuda", dtype)
    weight = torch.cat([torch.ones(300, 1), torch.randint(-8, 9, (300, 15)) / 32], 1).to("cuda", dtype)
    labels = torch.randint(300, (20,), device="cuda")
    z = hidden.double() @ weight.double().t()
    exact = torch.nn.functional.cross_entropy(z, labels, reduction="none", label_smoothing=0.1)
    torchs = torch.nn.functional.cross_entropy(z.float(), labels, reduction="none", label_smoothing=0.1)
    bound = max(2e-6, 2 * ((torchs - exact) / exact).abs().max().item())
    losses = linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1)
    assert ((losses - exact) / exact).abs().max() < bound


class TestGradScale:
    def test_another_gradient_does_not_cost_the_context(self) -> None:
        c = case(device="cuda")
        for _ in range(2):
            out = weighted_cross_entropy(
                c.hidden,
                with_main_grad(c.weight),
                c.labels,
                torch.ones(len(c.labels), device="cuda"),
                vocab_parallel=PADDED,
            )
            with pytest.raises(RuntimeError, match=r"received the gradient 2\.0, and grad_scale was 1\.0"):
                (out.total * 2).backward()
        torch.cuda.synchronize()
        (out.total.detach() * 2).item()

    def test_a_scale_that_was_divided_twice(self) -> None:
        c = case(device="cuda")
        for a, b in ((3, 7), (49, 11), (41, 47)):
            out = weighted_cross_entropy(
                c.hidden, c.weight, c.labels, torch.ones(len(c.labels), device="cuda"), vocab_parallel=PADDED,
                grad_scale=1 / (a * b),
            )  # fmt: skip
            (out.total / a / b).backward()
        torch.cuda.synchronize()

    def test_the_host_does_not_wait_for_the_device(self) -> None:
        """A device that is busy when the backward pass begins is still busy when the host has launched all of it."""
        c = case(device="cuda")
        order: list[bool] = []

        def launched(_: torch.Tensor) -> None:
            order.append(busy.query())

        for _ in range(2):  # the first compiles
            order.clear()
            out = weighted_cross_entropy(
                c.hidden, c.weight, c.labels, torch.ones(len(c.labels), device="cuda"), vocab_parallel=PADDED
            )
            busy = torch.cuda.Event()
            torch.cuda._sleep(200_000_000)
            busy.record()
            handle = c.hidden.register_hook(launched)
            out.total.backward()
            handle.remove()
        assert order == [False]

    def test_in_a_cuda_graph(self) -> None:
        c = case(device="cuda")
        weights = torch.ones(len(c.labels), device="cuda")

        def step() -> None:
            c.hidden.grad = c.weight.grad = None
            weighted_cross_entropy(c.hidden, c.weight, c.labels, weights, vocab_parallel=PADDED).total.backward()

        step()
        expected = c.hidden.grad.clone()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        c.hidden.grad.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(c.hidden.grad, expected)


class TestStrides:
    """What the tensor memory accelerator cannot take is copied, not passed on."""

    @pytest.mark.parametrize("tokens", [1, 2])
    @pytest.mark.parametrize("kind", ["odd stride", "odd address", "expanded", "transposed"])
    def test_hidden_states(self, kind: str, tokens: int) -> None:
        torch.manual_seed(0)
        c = case(device="cuda")
        x = c.hidden.detach()[:tokens]
        if kind == "odd stride":
            strided = torch.empty(tokens, 2 * x.shape[1] + 3, device="cuda").bfloat16()[:, : x.shape[1]].copy_(x)
        elif kind == "odd address":
            strided = torch.empty(x.numel() + 1, device="cuda").bfloat16()[1:].view_as(x).copy_(x)
        elif kind == "expanded":
            x = x[:1].expand(tokens, -1)
            strided = x[:1].as_strided(x.shape, (0, 1))
        else:
            strided = x.t().contiguous().t()
        weights = torch.ones(tokens, device="cuda")
        labels = c.labels[:tokens]
        results = []
        for hidden in (x.clone().requires_grad_(), strided.detach().requires_grad_()):
            out = linear_logprobs(hidden, c.weight, labels, vocab_parallel=PADDED, invariant=True)
            logits = fp32_logits(hidden, c.weight, invariant=True)
            with_main_grad(c.weight)
            loss = weighted_cross_entropy(
                hidden, c.weight, labels, weights, vocab_parallel=PADDED, grad_precision="bf16x2", invariant=True
            )
            loss.total.backward()
            results.append((out.logprobs, logits, hidden.grad, c.weight.main_grad))
        for a, b in zip(*(result[:3] for result in results), strict=True):
            assert torch.equal(a, b)
        # The order of its sums is not promised.
        assert relative_error(results[0][3], results[1][3]) < 1e-5

    def test_a_weight_of_one_row(self) -> None:
        """Its row's stride is no length of anything."""
        x = torch.randn(4, 64, device="cuda").bfloat16()
        w = torch.randn(1, 131, device="cuda").bfloat16()[:, :64]
        out = linear_logprobs(x, w, torch.zeros(4, dtype=torch.long, device="cuda"))
        assert torch.equal(out.logprobs, torch.zeros(4, device="cuda"))


def test_memory_of_many_candidates() -> None:
    """The tokens with the largest log-probs, as many as make every block a candidate, in the memory of a chunk."""
    x = torch.randn(2048, 64, device="cuda").bfloat16()
    w = torch.randn(151936, 64, device="cuda").bfloat16()
    y = torch.zeros(2048, dtype=torch.long, device="cuda")
    for k in (1, 100, 2000):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = linear_logprobs(x, w, y, top_k=k)
        peak = torch.cuda.max_memory_allocated() - before
        # The results, and their parts before they are put together.
        assert peak < workspace.BYTES + 2.5 * 2048 * k * 12 + 2**26
        assert out.top_tokens is not None
        rows = out.top_tokens[:4].sort(1).values
        assert (rows[:, 1:] > rows[:, :-1]).all()
