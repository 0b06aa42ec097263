"""Log-probs under a truncated sampler, and the sets of top-k, top-p and min-p, against float64 and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import (
    VocabParallel,
    linear_logprobs,
    linear_selected_logprobs,
    linear_truncated_logprobs,
    linear_truncation_thresholds,
)
from megatron_fp32.testing.ranks import RankPool
from tests.ops.logprobs_cases import BENT, PADDED, TOKENS, VOCAB, Case, case, exact_logits, grouped, with_main_grad

Pool = Callable[[int], RankPool]
FP32 = 1e-6
FILTERS: list[dict[str, Any]] = [
    {"top_k": 20},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.01},
]


def keep_set(z: Tensor, top_k: int | None = None, top_p: float | None = None, min_p: float | None = None) -> Tensor:
    """bool, as vLLM does it: sorted, one filter after the other."""
    p = z.softmax(1)
    kept = torch.ones_like(z, dtype=torch.bool)
    if min_p is not None:
        kept &= p >= min_p * p.amax(1, keepdim=True)
    if top_k is not None:
        least = z.masked_fill(~kept, -torch.inf).topk(top_k, 1).values[:, -1:]
        kept &= z >= least
    if top_p is not None:
        ascending, order = z.masked_fill(~kept, -torch.inf).sort(1)
        removed = ascending.softmax(1).cumsum(1) <= 1 - top_p
        removed[:, -1] = False
        kept &= ~torch.zeros_like(kept).scatter(1, order, removed)
    return kept


def truth(c: Case, kept: Tensor, g: Tensor, h: Tensor, **options: Any) -> dict[str, Tensor]:
    x, w, z = exact_logits(c, **options)
    known = c.labels >= 0
    label = c.labels.clamp(min=0)[:, None]
    kept = kept | torch.zeros_like(kept).scatter(1, label, True)
    logp = z.masked_fill(~kept, -torch.inf).log_softmax(1)
    p = logp.exp()
    entropy = -(p * logp.masked_fill(~kept, 0.0)).sum(1)
    mass = z.log_softmax(1).masked_fill(~kept, -torch.inf).logsumexp(1)
    out = {"logprobs": logp.gather(1, label)[:, 0], "entropy": entropy, "mass": mass}
    out = {name: torch.where(known, t, 0.0) for name, t in out.items()}
    (out["logprobs"] * g + out["entropy"] * h).sum().backward()
    assert x.grad is not None
    assert w.grad is not None
    return {name: t.detach() for name, t in out.items()} | {"dX": x.grad, "dW": w.grad}


def as_tokens(kept: Tensor) -> Tensor:
    """[tokens, K], filled up with -100, in an order of no meaning; the last slot repeats the first."""
    most = int(kept.sum(1).max())
    tokens = torch.full((len(kept), most + 1), -100)
    for row, flags in enumerate(kept):
        found = flags.nonzero()[:, 0].flip(0)
        tokens[row, : len(found)] = found
        tokens[row, -1] = found[0]
    return tokens


@pytest.mark.parametrize("options", [{"vocab_size": VOCAB}, BENT], ids=["plain", "bent"])
@pytest.mark.parametrize("by", ["tokens", "threshold"])
@pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f))
def test_results_and_gradients(filters: dict[str, Any], by: str, options: dict[str, Any]) -> None:
    c = case()
    kept = keep_set(exact_logits(c, **options)[2].detach(), **filters)
    which: dict[str, Tensor]
    if by == "tokens":
        which = {"kept_tokens": as_tokens(kept)}
    else:
        logp = exact_logits(c, **options)[2].detach().log_softmax(1)
        least = logp.masked_fill(~kept, torch.inf).amin(1)
        most = logp.masked_fill(kept, -torch.inf).amax(1)
        which = {"min_logprob": ((least + most) / 2).float()}
    with_main_grad(c.weight)
    g, h = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(7))
    out = linear_truncated_logprobs(c.hidden, c.weight, c.labels, grad_precision="bf16x3", **which, **grouped(options))
    exact = truth(c, kept, g.double(), h.double(), **options)
    assert relative_error(out.logprobs, exact["logprobs"]) < FP32
    assert relative_error(out.entropy, exact["entropy"]) < FP32
    assert relative_error(out.mass, exact["mass"]) < 3 * FP32
    assert not out.mass.requires_grad
    for field in out:
        assert field[3] == 0
    (out.logprobs * g + out.entropy * h).sum().backward()
    assert relative_error(c.hidden.grad, exact["dX"]) < 3e-3
    assert relative_error(c.weight.main_grad, exact["dW"]) < 2e-6  # type: ignore[attr-defined]


@pytest.mark.parametrize("by", ["tokens", "threshold"])
def test_bias(by: str) -> None:
    c = case()
    bias = torch.randn(c.weight.shape[0])
    leaf = bias.double().requires_grad_()
    z = exact_logits(c, vocab_size=VOCAB, bias=leaf)[2].detach()
    kept = keep_set(z, top_k=20)
    g, h = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(7))
    mine = bias.clone().requires_grad_()
    which: dict[str, Tensor] = {"kept_tokens": as_tokens(kept)}
    if by == "threshold":
        cut = linear_truncation_thresholds(c.hidden, c.weight, top_k=20, bias=bias, vocab_parallel=PADDED)
        which = {"min_logprob": cut}
    out = linear_truncated_logprobs(
        c.hidden, c.weight, c.labels, bias=mine, vocab_parallel=PADDED, grad_precision="bf16x3", **which
    )
    exact = truth(c, kept, g.double(), h.double(), vocab_size=VOCAB, bias=leaf)
    assert relative_error(out.logprobs, exact["logprobs"]) < FP32
    assert relative_error(out.mass, exact["mass"]) < 3 * FP32
    (out.logprobs * g + out.entropy * h).sum().backward()
    assert mine.grad is not None
    assert leaf.grad is not None
    assert relative_error(mine.grad, leaf.grad) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("by", ["tokens", "threshold"])
def test_other_dtypes(dtype: torch.dtype, by: str) -> None:
    c = case(dtype)
    z = exact_logits(c, vocab_size=VOCAB)[2].detach()
    kept = keep_set(z, top_k=20)
    g, h = torch.randn(2, TOKENS, generator=torch.Generator().manual_seed(7))
    threshold = z.log_softmax(1).sort(1, descending=True).values[:, 19:21].mean(1).float()
    which = {"kept_tokens": as_tokens(kept)} if by == "tokens" else {"min_logprob": threshold}
    out = linear_truncated_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED, chunk_size=50, **which)
    exact = truth(c, kept, g.double(), h.double(), vocab_size=VOCAB)
    assert relative_error(out.logprobs, exact["logprobs"]) < FP32
    (out.logprobs * g + out.entropy * h).sum().backward()
    bound = 2e-6 if dtype == torch.float32 else 2e-3
    assert relative_error(c.hidden.grad, exact["dX"]) < bound
    assert relative_error(c.weight.grad, exact["dW"]) < bound


def test_a_threshold_that_keeps_all_is_no_threshold() -> None:
    c = case()
    out = linear_truncated_logprobs(
        c.hidden, c.weight, c.labels, min_logprob=torch.full((TOKENS,), -torch.inf), vocab_parallel=PADDED
    )
    whole = linear_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED)
    assert torch.equal(out.logprobs, whole.logprobs)
    assert torch.equal(out.entropy, whole.entropy)
    assert out.mass.eq(0).all()


@pytest.mark.parametrize("by", ["tokens", "threshold"])
def test_a_label_alone(by: str) -> None:
    """Its log-prob is 0, and so are all gradients, although its own probability is tiny."""
    c = case()
    least = exact_logits(c, vocab_size=VOCAB)[2].detach().argmin(1)
    which: dict[str, Tensor] = {"kept_tokens": least[:, None]}
    if by == "threshold":
        which = {"min_logprob": torch.full((TOKENS,), 0.5)}
    out = linear_truncated_logprobs(c.hidden, c.weight, least, vocab_parallel=PADDED, **which)
    assert out.logprobs.eq(0).all()
    assert out.entropy.eq(0).all()
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert c.hidden.grad is not None
    assert c.hidden.grad.eq(0).all()


@pytest.mark.parametrize("by", ["tokens", "threshold"])
def test_tokens_that_are_not_kept_get_nothing(by: str) -> None:
    x = torch.randn(6, 300).requires_grad_()
    labels = x.detach().argmin(1)
    kept = keep_set(x.detach().double(), top_k=5)
    threshold = x.detach().log_softmax(1).sort(1, descending=True).values[:, 4:6].mean(1)
    which = {"kept_tokens": as_tokens(kept)} if by == "tokens" else {"min_logprob": threshold}
    out = linear_truncated_logprobs(x, torch.eye(300), labels, **which)
    out.logprobs.sum().backward()
    assert x.grad is not None
    expected = kept.scatter(1, labels[:, None], True)
    assert torch.equal(x.grad != 0, expected)


def test_probabilities_of_almost_one_keep_their_digits() -> None:
    x = torch.tensor([[30.0, -3.0, 25.0, 29.0]]).requires_grad_()
    out = linear_truncated_logprobs(x, torch.eye(4), torch.tensor([0]), kept_tokens=torch.tensor([[1, 0]]))
    torch.testing.assert_close(out.logprobs.item(), -torch.tensor(-33.0).double().exp().item(), rtol=1e-6, atol=0)
    out.logprobs.sum().backward()
    small = torch.tensor(-33.0).double().exp().float().item()
    torch.testing.assert_close(x.grad, torch.tensor([[small, -small, 0.0, 0.0]]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("by", ["tokens", "threshold"])
def test_a_mass_of_almost_one_keeps_its_digits(by: str) -> None:
    x = torch.tensor([[20.0, 19.0, 1.0, 0.0, -30.0]])
    which: dict[str, Tensor] = {"kept_tokens": torch.tensor([[0, 1]])}
    if by == "threshold":
        which = {"min_logprob": torch.tensor([-10.0])}
    out = linear_truncated_logprobs(x, torch.eye(5), torch.tensor([1]), **which)
    exact = (-x.double().softmax(1)[:, 2:].sum(1)).log1p()
    torch.testing.assert_close(out.mass.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("by", ["tokens", "threshold"])
def test_what_is_wrong_with_one_token_stays_there(by: str) -> None:
    c = case()
    kept = as_tokens(keep_set(exact_logits(c, vocab_size=VOCAB)[2].detach(), top_k=20))
    x, weight = c.hidden.detach().clone(), c.weight.detach().clone()
    x[3] = x[8] = torch.nan
    weight[VOCAB:] = torch.nan
    labels = c.labels.clone()
    labels[10] = VOCAB + 3
    c = c.copy(hidden=x, weight=weight, labels=labels)
    which: dict[str, Tensor] = {"kept_tokens": kept}
    if by == "threshold":
        which = {"min_logprob": torch.full((TOKENS,), -5.0)}
        which["min_logprob"][12] = torch.nan
    out = linear_truncated_logprobs(c.hidden, c.weight, c.labels, vocab_parallel=PADDED, **which)
    bad = {8, 10} | ({12} if by == "threshold" else set())
    assert set(out.logprobs.isnan().nonzero()[:, 0].tolist()) == bad
    assert out.mass[12].isnan() == (12 in bad)
    assert out.mass[3] == 0
    assert out.logprobs[3] == 0
    g = torch.ones(TOKENS)
    g[list(bad)] = 0
    (out.logprobs * g).nan_to_num().sum().backward()
    assert c.hidden.grad is not None
    assert c.hidden.grad.isfinite().all()
    assert c.hidden.grad[[3, *bad]].eq(0).all()


class TestThresholds:
    @pytest.mark.parametrize("options", [{"vocab_size": VOCAB}, BENT], ids=["plain", "bent"])
    @pytest.mark.parametrize("filters", FILTERS, ids=lambda f: "+".join(f))
    def test_the_sets(self, filters: dict[str, Any], options: dict[str, Any]) -> None:
        c = case(torch.float32)
        mask = torch.ones(TOKENS, dtype=torch.bool)
        mask[3] = False
        found = linear_truncation_thresholds(
            c.hidden, c.weight, mask=mask, chunk_size=40, **filters, **grouped(options)
        )
        z = exact_logits(c, **options)[2].detach()
        assert torch.equal(z.log_softmax(1)[mask] >= found[mask, None], keep_set(z, **filters)[mask])
        assert found[3] == 0
        assert not found.requires_grad

    def test_equal_logits_stay_together(self) -> None:
        x = torch.zeros(2, 50)
        x[:, 7] = 1
        found = linear_truncation_thresholds(x, torch.eye(50), top_k=3)
        assert torch.equal(found, torch.full((2,), -torch.inf))

    @pytest.mark.parametrize("filters", [{}, {"top_p": 1.0}, {"top_k": VOCAB}])
    def test_no_filter_keeps_all(self, filters: dict[str, Any]) -> None:
        c = case()
        found = linear_truncation_thresholds(c.hidden, c.weight, vocab_parallel=PADDED, **filters)
        assert found.isneginf().all()

    def test_a_position_of_nan(self) -> None:
        x = torch.randn(3, 50)
        x[1] = torch.nan
        found = linear_truncation_thresholds(x, torch.eye(50), top_k=3, top_p=0.5, min_p=0.1)
        assert found.isnan().tolist() == [False, True, False]

    @pytest.mark.parametrize("filters", [{"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -1.0}, {"top_k": 0}])
    def test_values_that_make_no_sense(self, filters: dict[str, Any]) -> None:
        c = case()
        with pytest.raises(ValueError, match=r"top_p|min_p|top_k"):
            linear_truncation_thresholds(c.hidden, c.weight, **filters)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"kept_tokens": torch.zeros(TOKENS, 2).long(), "min_logprob": torch.zeros(TOKENS)},
        {"kept_tokens": torch.zeros(TOKENS).long()},
        {"kept_tokens": torch.zeros(TOKENS - 1, 3).long()},
        {"min_logprob": torch.zeros(TOKENS, 1)},
        {"min_logprob": torch.zeros(TOKENS).requires_grad_()},
    ],
)
def test_arguments_that_do_not_match(arguments: dict[str, Any]) -> None:
    c = case()
    with pytest.raises(ValueError, match="expected"):
        linear_truncated_logprobs(c.hidden, c.weight, c.labels, **arguments)


@pytest.mark.parametrize(
    "arguments", [{"kept_tokens": torch.zeros(TOKENS, 2)}, {"min_logprob": torch.zeros(TOKENS).long()}]
)
def test_types_that_do_not_match(arguments: dict[str, Any]) -> None:
    c = case()
    with pytest.raises(TypeError, match="must be"):
        linear_truncated_logprobs(c.hidden, c.weight, c.labels, **arguments)


@pytest.mark.parametrize("by", ["tokens", "threshold"])
def test_invariance(by: str) -> None:
    c = case()
    kept = as_tokens(keep_set(exact_logits(c, vocab_size=VOCAB)[2].detach(), top_k=20))
    which = {"kept_tokens": kept} if by == "tokens" else {"min_logprob": torch.linspace(-9, -1, TOKENS)}
    g, h = torch.randn(2, TOKENS)

    def run(rows: slice) -> list[Tensor]:
        x = c.hidden.detach()[rows].clone().requires_grad_()
        given: dict[str, Any] = {name: value[rows] for name, value in which.items()}
        out = linear_truncated_logprobs(
            x, c.weight.detach(), c.labels[rows], invariant=True, vocab_parallel=PADDED, **given
        )
        (out.logprobs * g[rows] + out.entropy * h[rows]).sum().backward()
        assert x.grad is not None
        return [*(f.detach() for f in out), x.grad]

    whole = run(slice(0, TOKENS))
    for rows in (slice(0, 1), slice(63, 66), slice(100, 150)):
        for a, b in zip(run(rows), whole, strict=True):
            assert torch.equal(a, b[rows])


def head(ranks: int, by: str, invariant: bool) -> dict[str, Tensor]:
    rank, group = (dist.get_rank(), dist.group.WORLD) if ranks > 1 else (0, None)
    torch.manual_seed(0)
    rows = 512
    weight = torch.randn(rows, 64).bfloat16()
    weight[450:] = torch.nan
    hidden = (torch.randn(8, 4, 64) / 3).bfloat16().requires_grad_()
    labels = torch.randint(450, (8, 4))
    labels[0, 0] = -100
    mine = weight.chunk(ranks)[rank].clone().requires_grad_()
    parallel = VocabParallel(group=group, vocab_size=450)
    with torch.no_grad():
        cut = linear_truncation_thresholds(hidden, mine, top_k=40, top_p=0.9, vocab_parallel=parallel)
    which: dict[str, Any] = {"min_logprob": cut}
    if by == "tokens":
        which = {"kept_tokens": torch.stack([(labels.clamp(min=0) * k + 31 * k) % 450 for k in range(1, 9)], -1)}
    out = linear_truncated_logprobs(hidden, mine, labels, vocab_parallel=parallel, invariant=invariant, **which)
    (out.logprobs * torch.linspace(-1, 1, 32).view(8, 4) + 0.5 * out.entropy).sum().backward()
    assert hidden.grad is not None
    assert mine.grad is not None
    return {**{n: f.detach() for n, f in out._asdict().items()}, "cut": cut, "dX": hidden.grad, "dW": mine.grad}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("by", ["tokens", "threshold"])
def test_ranks_agree_with_one(ranks: Pool, size: int, by: str) -> None:
    alone = head(1, by, False)
    answers = ranks(size).run(head, size, by, False)
    for name in ("logprobs", "entropy", "mass", "cut"):
        assert relative_error(answers[0][name], alone[name]) < 3e-6, name
        assert all(torch.equal(a[name], answers[0][name]) for a in answers)
    assert relative_error(answers[0]["dX"], alone["dX"]) < 1e-3
    assert relative_error(torch.cat([a["dW"] for a in answers])[:450], alone["dW"][:450]) < 1e-3
    exact = head(1, by, True)
    for answer in ranks(size).run(head, size, by, True):
        for name in ("logprobs", "entropy", "mass", "dX"):
            assert torch.equal(answer[name], exact[name]), name


def test_the_logits_of_selected_tokens_give_the_same() -> None:
    """A user's own softmax over `SelectedLogprobs.logits`."""
    c = case()
    tokens = torch.stack([torch.randperm(VOCAB)[:9] for _ in range(TOKENS)])
    own = linear_selected_logprobs(c.hidden, c.weight, tokens, vocab_parallel=PADDED).logits.log_softmax(1)[:, 0]
    out = linear_truncated_logprobs(c.hidden, c.weight, tokens[:, 0], kept_tokens=tokens, vocab_parallel=PADDED)
    torch.testing.assert_close(out.logprobs, own, rtol=2e-6, atol=2e-6)
