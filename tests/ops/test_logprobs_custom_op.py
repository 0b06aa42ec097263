"""The head without logits where tensors are fake and compilers look."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_fp32.ops.logprobs import LogitsTransform, VocabParallel, custom_op, linear_cross_entropy, linear_logprobs
from megatron_fp32.ops.logprobs.loss import token_losses
from megatron_fp32.testing.ranks import RankPool
from tests.ops.logprobs_cases import PADDED, TOKENS, Case, case, with_main_grad

Pool = Callable[[int], RankPool]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "saved": {"backward": "saved", "temperature": 0.7},
    "invariant": {"invariant": True, "grad_precision": "bf16x2"},
    "capped": {"logits_transform": LogitsTransform(scale=1.3, softcap=5.0), "chunk_size": 40},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def both_losses(c: Case, bias: Tensor, options: dict[str, Any]) -> tuple[Tensor, ...]:
    out = linear_logprobs(
        c.hidden * 2, c.weight, c.labels, bias=bias, vocab_parallel=PADDED, top_k=3, mean_logit=True, **options
    )
    found = linear_cross_entropy(
        c.hidden * 2, c.weight, c.labels, bias=bias, vocab_parallel=PADDED, label_smoothing=0.1, z_loss=1e-3,
        reduction="mean", with_metrics=True, **options,
    )  # fmt: skip
    assert out.mean_logit is not None
    assert out.top_logprobs is not None
    assert out.top_tokens is not None
    total = (out.logprobs + 0.3 * out.entropy - out.logsumexp + out.mean_logit).sum() + found.loss
    return total, out.logprobs, out.top_logprobs, out.top_tokens, found.loss, found.z_loss, found.correct


def run(function: Callable[..., tuple[Tensor, ...]], options: dict[str, Any]) -> list[Tensor]:
    c, bias = case(), torch.linspace(-1, 1, 700).requires_grad_()
    total, *results = function(c, bias, options)
    total.backward()
    assert not results[1].requires_grad
    return [*(r.detach() for r in results), *(x.grad for x in (c.hidden, c.weight, bias))]  # type: ignore[list-item]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_whole_graph_computes_what_the_eager_functions_do(name: str) -> None:
    compiled = torch.compile(both_losses, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, OPTIONS[name]), run(both_losses, OPTIONS[name]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_gradient_alone(frozen: str) -> None:
    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_logprobs(hidden, weight, labels).logprobs.sum()

    found = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        c = case()
        getattr(c, frozen).requires_grad_(False)
        function(c.hidden, c.weight, c.labels).backward()
        assert getattr(c, frozen).grad is None
        found.append(c.hidden.grad if frozen == "weight" else c.weight.grad)
    assert torch.equal(*found)  # type: ignore[arg-type]


def test_a_weight_with_main_grad_breaks_the_graph_and_gets_its_gradient() -> None:
    def loss(c: Case) -> Tensor:
        return linear_cross_entropy(c.hidden * 2, c.weight, c.labels, vocab_parallel=PADDED, reduction="mean") * 3

    found = []
    counter = CompileCounterWithBackend("aot_eager")
    for function in (loss, torch.compile(loss, backend=counter)):
        c = case()
        with_main_grad(c.weight)
        function(c).backward()
        found.append(c.weight.main_grad)  # type: ignore[attr-defined]
    assert counter.frame_count > 1
    assert torch.equal(*found)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize("name", OPTIONS)
def test_the_operators_are_what_they_declare(name: str) -> None:
    options = OPTIONS[name]
    c = case()
    calls: list[tuple[Any, ...]] = []
    with pytest.MonkeyPatch.context() as patch:
        real = custom_op.logprobs
        patch.setattr(custom_op, "logprobs", lambda *args: calls.append(args) or real(*args))
        patch.setattr("megatron_fp32.ops.logprobs.autograd.is_traced", lambda _: True)
        linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED, top_k=2, mean_logit=True, **options)
        linear_cross_entropy(c.hidden, c.weight, c.labels, vocab_parallel=PADDED, with_metrics=True, **options)
    assert len(calls) == 2
    for call in calls:
        checks = torch.library.opcheck(custom_op.logprobs, call)
        assert set(checks.values()) == {"SUCCESS"}
    fields = [torch.randn(TOKENS).requires_grad_() for _ in range(3)]
    for smoothing, z_loss in ((0.0, 0.0), (0.1, 0.0), (0.1, 1e-3)):
        checks = torch.library.opcheck(token_losses, (*fields, smoothing, z_loss))
        assert set(checks.values()) == {"SUCCESS"}


def test_fake_tensors() -> None:
    with FakeTensorMode():
        hidden = torch.empty(3, 2, 16, dtype=torch.bfloat16, requires_grad=True)
        weight, labels = torch.empty(40, 16, dtype=torch.bfloat16), torch.empty(3, 2, dtype=torch.int64)
        out = linear_logprobs(hidden, weight, labels, top_k=5)
        assert out.top_tokens is not None
        assert (out.logprobs.shape, out.top_tokens.shape) == ((3, 2), (3, 2, 5))
        (grad,) = torch.autograd.grad(out.entropy.sum(), hidden)
        assert (grad.shape, grad.dtype) == (hidden.shape, torch.bfloat16)


def on_ranks(compiled: bool, sequence_parallel: bool) -> list[Tensor]:
    torch._dynamo.reset()
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 4, 64).bfloat16(), (torch.randn(512, 64) / 8).bfloat16()
    labels = torch.randint(500, (8, 4))
    hidden = (hidden.chunk(size)[rank] if sequence_parallel else hidden).clone().requires_grad_()
    mine = weight.chunk(size)[rank].clone().requires_grad_()
    parallel = VocabParallel(group=dist.group.WORLD, vocab_size=500, sequence_parallel=sequence_parallel)

    def loss(hidden: Tensor, mine: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, mine, labels, vocab_parallel=parallel, z_loss=1e-3)

    counter = CompileCounterWithBackend("aot_eager")
    function = torch.compile(loss, fullgraph=True, backend=counter) if compiled else loss
    # Other tests of these ranks run megatron-core, where nothing is compiled.
    with torch.compiler.set_stance("default"):
        losses = function(hidden, mine)
        losses.sum().backward()
    assert counter.frame_count == int(compiled)
    return [losses.detach(), hidden.grad, mine.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks(ranks: Pool, sequence_parallel: bool) -> None:
    compiled = ranks(2).run(on_ranks, True, sequence_parallel)
    for a, b in zip(compiled, ranks(2).run(on_ranks, False, sequence_parallel), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
