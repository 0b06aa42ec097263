"""The frameworks' functions over tensor- and context-parallel ranks, against their definitions in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.integrations import areal, nemo_rl, slime, verl
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from tests.integrations.definitions import (
    context_parallel_part,
    next_token_logprobs,
    packed_logprobs,
    token_logprobs,
)

Pool = Callable[[int], RankPool]
VOCAB, HIDDEN, BATCH, TOKENS = 160, 24, 2, 8
BOUNDARIES = [0, 8, 24, 32]
SIZES = pytest.mark.parametrize("size", [2, 4])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, upstream gradients, and a mask; the logits of token 3 are NaN."""
    torch.manual_seed(1)
    logits, labels = (torch.randn(BATCH * TOKENS, VOCAB) * 4).to(dtype), torch.randint(VOCAB, (BATCH * TOKENS,))
    labels[0], labels[1], labels[2], logits[3] = -100, 0, VOCAB - 1, torch.nan
    return logits, labels, torch.randn(2, BATCH * TOKENS), torch.rand(BATCH * TOKENS, VOCAB) < 0.2


def from_logits(name: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor | None]:
    """On one rank: what a function returns, flat, and the gradient of this rank's columns."""
    logits, labels, upstream, keep = problem(dtype)
    group, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    assert group is not None
    leaf = logits.chunk(ranks, 1)[rank].clone().requires_grad_()
    mask, used = keep.chunk(ranks, 1)[rank], leaf * 1
    batch, batch_labels = used.view(BATCH, TOKENS, -1), labels.view(BATCH, TOKENS)
    results: Any
    if name == "areal":
        results = areal.gather_logprobs_entropy(batch, batch_labels, 0.8, group, 3)
    elif name == "areal, reused":
        results = areal.gather_logprobs_entropy(batch, batch_labels, 0.8, group, reuse_logits=True)
    elif name == "slime":
        results = slime.calculate_log_probs_and_entropy(used, labels, group, True, 5)
    elif name == "slime, all ranks":
        results = slime.calculate_log_probs_and_entropy(used, labels, None, True)
    elif name == "slime, masked":
        results = slime.calculate_log_probs_and_entropy(used, labels, group, True, log_prob_keep_mask=mask)
    else:
        assert name == "verl"
        with model_parallel(tensor=ranks):
            results = (
                verl.vocab_parallel_log_probs_from_logits(batch, batch_labels),
                verl.vocab_parallel_entropy_with_chunking(batch, 3),
            )
            assert torch.equal(results[1].nan_to_num(7), verl.vocab_parallel_entropy(batch).nan_to_num(7))
    torch.autograd.backward(list(results), [g.view_as(r) for g, r in zip(upstream, results, strict=True)])
    return [r.detach().flatten() for r in results], leaf.grad


@SIZES
@DTYPES
@pytest.mark.parametrize("name", ["areal", "areal, reused", "slime", "slime, all ranks", "slime, masked", "verl"])
def test_from_logits(ranks: Pool, size: int, dtype: torch.dtype, name: str) -> None:
    logits, labels, upstream, keep = problem(dtype)
    exact = logits.double().requires_grad_()
    logprobs, entropy = token_logprobs(exact, labels, 0.8 if "areal" in name else 1.0)
    if "masked" in name:
        own = torch.nn.functional.one_hot(labels.clamp(min=0), VOCAB).bool()
        logprobs, _ = token_logprobs(exact.masked_fill(~(keep | own), -1e30), labels)
    torch.autograd.backward([logprobs, entropy], [g.double() for g in upstream])
    answers = ranks(size).run(from_logits, name, dtype)
    for outputs, _ in answers[1:]:
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(outputs, answers[0][0], strict=True))
    for got, expected in zip(answers[0][0], (logprobs, entropy), strict=True):
        assert got[3].isnan()
        assert relative_error(without_token_3(got), without_token_3(expected.detach())) < 1e-6
    grad, expected_grad = torch.cat([grad for _, grad in answers], 1), exact.grad
    assert expected_grad is not None
    assert grad.dtype == dtype
    assert relative_error(without_token_3(grad), without_token_3(expected_grad)) < (
        1e-6 if dtype.itemsize == 4 else 3e-3
    )


def without_token_3(x: Tensor) -> Tensor:
    return torch.cat([x[:3], x[4:]])


def hidden_problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states [tokens, batch, hidden], weight, tokens [batch, tokens], upstream."""
    torch.manual_seed(2)
    hidden, weight = torch.randn(TOKENS, BATCH, HIDDEN) * 3, torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5
    return hidden, weight, torch.randint(VOCAB, (BATCH, TOKENS)), torch.randn(2, BATCH * TOKENS)


def verl_hidden() -> dict[str, Any]:
    hidden, weight, labels, upstream = hidden_problem()
    group, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    x, w = hidden.requires_grad_(), weight.chunk(ranks)[rank].clone().requires_grad_()
    out = verl.linear_cross_entropy(x, w, labels.t(), 0.8, "none", group)
    torch.autograd.backward(out, list(upstream))
    return {"outputs": [o.detach() for o in out], "dX": x.grad, "dW": w.grad}


@SIZES
def test_verl_from_hidden_states(ranks: Pool, size: int) -> None:
    """dX is this rank's part of the sum: the caller's gather adds the parts."""
    hidden, weight, labels, upstream = hidden_problem()
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = token_logprobs((x @ w.t()).flatten(0, 1), labels.t().flatten(), 0.8)
    torch.autograd.backward(exact, [g.double() for g in upstream])
    answers = ranks(size).run(verl_hidden)
    for answer in answers:
        for got, expected in zip(answer["outputs"], exact, strict=True):
            assert relative_error(got, expected.detach()) < 2e-6
    assert x.grad is not None
    assert w.grad is not None
    assert relative_error(torch.stack([a["dX"] for a in answers]).sum(0), x.grad) < 2e-6
    assert relative_error(torch.cat([a["dW"] for a in answers]), w.grad) < 2e-6


def nemo_hidden() -> dict[str, Any]:
    hidden, weight, target, upstream = hidden_problem()
    group, ranks, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    columns = VOCAB // ranks
    x, w = hidden.chunk(ranks)[rank].clone().requires_grad_(), weight.chunk(ranks)[rank].clone().requires_grad_()
    out = nemo_rl.from_parallel_hidden_states_to_logprobs(
        x, w, None, target, rank * columns, (rank + 1) * columns, group, chunk_size=3
    )
    out.backward(upstream[0].view(BATCH, TOKENS)[:, 1:])
    return {"outputs": out.detach(), "dX": x.grad, "dW": w.grad}


@SIZES
def test_nemo_rl_from_hidden_states(ranks: Pool, size: int) -> None:
    hidden, weight, target, upstream = hidden_problem()
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    exact = next_token_logprobs((x @ w.t()).transpose(0, 1), target)
    exact.backward(upstream[0].view(BATCH, TOKENS)[:, 1:].double())
    answers = ranks(size).run(nemo_hidden)
    assert x.grad is not None
    assert w.grad is not None
    assert relative_error(answers[0]["outputs"], exact.detach()) < 1e-6
    assert relative_error(torch.cat([a["dX"] for a in answers]), x.grad) < 2e-6
    assert relative_error(torch.cat([a["dW"] for a in answers]), w.grad) < 2e-6


def grid(tensor: int) -> tuple[Any, int, Any, int]:
    """Tensor-parallel and context-parallel group of this rank, with its place in each; the first varies fastest."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    tp = [dist.new_group(list(range(i, i + tensor))) for i in range(0, ranks, tensor)]
    cp = [dist.new_group(list(range(i, ranks, tensor))) for i in range(tensor)]
    return tp[rank // tensor], rank % tensor, cp[rank % tensor], rank // tensor


def nemo_problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits [2, 16, vocab] and targets of 13 tokens; a pack of 32; upstream of both."""
    torch.manual_seed(3)
    logits, target = torch.randn(2, 16, VOCAB) * 4, torch.randint(VOCAB, (2, 13))
    return logits, target, torch.randint(VOCAB, (1, 32)), torch.randn(2, 12), torch.randn(3, 10)


def nemo_logits(tensor: int, dtype: torch.dtype) -> dict[str, Any]:
    logits, target, pack, upstream, pack_upstream = nemo_problem()
    tp_group, tp, cp_group, cp = grid(tensor)
    context = dist.get_world_size() // tensor
    columns = VOCAB // tensor
    mine = slice(tp * columns, (tp + 1) * columns)
    whole = torch.stack([context_parallel_part(z, cp, context) for z in logits])[..., mine].to(dtype).requires_grad_()
    shared: dict[str, Any] = {"cp_group": cp_group, "chunk_size": 3}
    out = nemo_rl.get_next_token_logprobs_from_logits(
        target, whole, vocab_parallel_rank=tp, vocab_parallel_group=tp_group, context_parallel_group=cp_group,
        chunk_size=3,
    )  # fmt: skip
    again = nemo_rl.from_parallel_logits_to_logprobs(whole, target, mine.start, mine.stop, tp_group, **shared)
    assert torch.equal(out, again)
    # Each rank adds a part of the gradient, as where each of them computes its part of the loss.
    out.backward(upstream * (cp + 1))
    spans = list(itertools.pairwise(BOUNDARIES))
    packed = logits.view(32, VOCAB)
    parts = torch.cat([context_parallel_part(packed[a:b], cp, context) for a, b in spans])
    part = parts[None, :, mine].to(dtype).requires_grad_()
    cu = torch.tensor(BOUNDARIES, dtype=torch.int32)
    call = nemo_rl.from_parallel_logits_to_logprobs_packed_sequences
    unpacked = call(part, pack, cu, 11, mine.start, mine.stop, tp_group, **shared)
    unpacked.backward(pack_upstream)
    rolled = torch.cat([context_parallel_part(pack[0, a:b].roll(-1), cp, context) for a, b in spans])[None]
    same = call(part, rolled, cu, 11, mine.start, mine.stop, tp_group, target_is_pre_rolled=True, **shared)
    assert torch.equal(same, unpacked)
    entropy = nemo_rl.ChunkedDistributedEntropy.apply(whole.detach(), 2, tp_group)
    dist.destroy_process_group(tp_group)
    dist.destroy_process_group(cp_group)
    return {
        "outputs": out.detach(), "packed": unpacked.detach(), "entropy": entropy, "grad": whole.grad,
        "packed_grad": part.grad,
    }  # fmt: skip


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (4, 1), (1, 2), (2, 2)])
@DTYPES
def test_nemo_rl_from_logits(ranks: Pool, tensor: int, context: int, dtype: torch.dtype) -> None:
    logits, target, pack, upstream, pack_upstream = nemo_problem()
    exact = logits.to(dtype).double().requires_grad_()
    whole = next_token_logprobs(exact[:, :13], target)
    # 1 + 2 + ...: what the context-parallel ranks' upstream gradients sum to.
    (grad,) = torch.autograd.grad(whole, exact, upstream.double() * (context * (context + 1) / 2))
    packed = packed_logprobs(exact.view(32, VOCAB), pack[0], BOUNDARIES, 10)
    (packed_grad,) = torch.autograd.grad(packed, exact, pack_upstream.double() * context)
    entropy = token_logprobs(exact.detach(), torch.zeros(2, 16, dtype=torch.int64))[1]
    bound = 1e-6 if dtype == torch.float32 else 3e-3
    answers = ranks(tensor * context).run(nemo_logits, tensor, dtype)
    spans = list(itertools.pairwise(BOUNDARIES))
    for rank, answer in enumerate(answers):
        tp, cp = rank % tensor, rank // tensor
        mine = slice(tp * VOCAB // tensor, (tp + 1) * VOCAB // tensor)
        assert torch.equal(answer["outputs"], answers[0]["outputs"])
        assert torch.equal(answer["packed"], answers[0]["packed"])
        assert relative_error(answer["outputs"], whole.detach()) < 1e-6
        assert relative_error(answer["packed"], packed.detach()) < 1e-6
        assert (
            relative_error(answer["entropy"], -torch.stack([context_parallel_part(h, cp, context) for h in entropy]))
            < 1e-6
        )
        expected = torch.stack([context_parallel_part(z, cp, context) for z in grad[..., mine]])
        assert relative_error(answer["grad"], expected) < bound
        flat = packed_grad.view(32, VOCAB)[:, mine]
        expected = torch.cat([context_parallel_part(flat[a:b], cp, context) for a, b in spans])[None]
        assert relative_error(answer["packed_grad"], expected) < bound


def refused() -> list[str]:
    """What a function says whose columns are another rank's, or whose sequence cannot be cut; nobody hangs."""
    logits, target = torch.randn(1, 5, VOCAB // 2), torch.randint(VOCAB, (1, 10))
    found = []
    for begin, cp_group in ((VOCAB, None), (dist.get_rank() * VOCAB // 2, dist.group.WORLD)):
        try:
            nemo_rl.from_parallel_logits_to_logprobs(
                logits, target[:, : 5 if cp_group is None else 10], begin, begin + VOCAB // 2, dist.group.WORLD,
                cp_group=cp_group,
            )  # fmt: skip
        except ValueError as error:
            found.append(str(error))
    return found


def test_refused_on_every_rank(ranks: Pool) -> None:
    for rank, (columns, length) in enumerate(ranks(2).run(refused)):
        assert f"on rank {rank} with 80 columns, got 160 and 240" in columns
        assert "expected a multiple of 4 tokens over 2 context-parallel ranks, got 10" in length
