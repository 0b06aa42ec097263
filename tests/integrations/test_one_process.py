"""The frameworks' functions in one process, against their definitions in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.integrations import areal, nemo_rl, slime, verl
from megatron_fp32.ops.logits.reference import relative_error
from tests.integrations.definitions import next_token_logprobs, packed_logprobs, token_logprobs

VOCAB = 200
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def logits_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(*shape, VOCAB) * 4).to(dtype)


def labels_of(*shape: int) -> Tensor:
    labels = torch.randint(VOCAB, shape)
    labels.view(-1)[1] = -100
    return labels


def check(
    function: Callable[[Tensor], Any],
    definition: Callable[[Tensor], Any],
    logits: Tensor,
    *,
    bound: float = 3e-7,
    roundings: float = 1.001,
) -> None:
    """Values, shapes and the gradient for random cotangents; the logits stay as they were.

    The gradient's error is what `roundings` of the truth to the logits' dtype make, and `bound`.
    """
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, expected = function(leaf), definition(exact)
    got, expected = (x if isinstance(x, tuple) else (x,) for x in (got, expected))
    upstream = []
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == b.shape
        assert relative_error(a.detach(), b.detach()) < bound
        upstream.append(torch.randn(b.shape))
    torch.autograd.backward(got, upstream)
    torch.autograd.backward(expected, [g.double() for g in upstream])
    assert leaf.grad is not None
    assert exact.grad is not None
    assert leaf.grad.dtype == logits.dtype
    once = relative_error(exact.grad.to(logits.dtype), exact.grad)
    assert relative_error(leaf.grad, exact.grad) < roundings * once + 2 * bound
    assert torch.equal(leaf.detach(), logits)


@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(13,), (5, 3)])
def test_areal(dtype: torch.dtype, temperature: float, shape: tuple[int, ...]) -> None:
    logits, labels = logits_of(*shape, dtype=dtype), labels_of(*shape)
    for reuse in (False, True):
        check(
            lambda z, reuse=reuse: areal.gather_logprobs_entropy(
                z, labels, temperature, chunk_size=4, reuse_logits=reuse
            ),
            lambda z: token_logprobs(z, labels, temperature),
            logits,
        )
    check(
        lambda z: areal.gather_logprobs(z, labels, temperature),
        lambda z: token_logprobs(z, labels, temperature)[0],
        logits,
    )


@DTYPES
@pytest.mark.parametrize("chunk_size", [-1, 3])
def test_slime(dtype: torch.dtype, chunk_size: int) -> None:
    logits, labels = logits_of(11, dtype=dtype), labels_of(11)
    call = slime.calculate_log_probs_and_entropy

    def definition(z: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = token_logprobs(z, labels)
        return logprobs[:, None], entropy

    check(lambda z: call(z, labels, None, True, chunk_size), definition, logits)
    check(lambda z: call(z, labels, None, chunk_size=chunk_size)[0], lambda z: definition(z)[0], logits)
    assert call(logits, labels, None)[1] is None
    logprobs, entropy = call(logits.requires_grad_(), labels, None, with_entropy=True, with_entropy_grad=False)
    assert logprobs.requires_grad
    assert entropy is not None
    assert not entropy.requires_grad


@DTYPES
def test_slime_with_a_mask(dtype: torch.dtype) -> None:
    """Log-probs over what is kept and the label; the entropy over everything. A NaN that is not kept is not seen."""
    logits, labels, keep = logits_of(11, dtype=dtype), labels_of(11), torch.rand(11, VOCAB) < 0.2
    keep[4] = False

    def definition(z: Tensor) -> tuple[Tensor, Tensor]:
        own = torch.nn.functional.one_hot(labels.clamp(min=0), VOCAB).bool()
        logprobs, _ = token_logprobs(z.masked_fill(~(keep | own), -1e30), labels)
        return logprobs[:, None], token_logprobs(z, labels)[1]

    def call(z: Tensor) -> Any:
        return slime.calculate_log_probs_and_entropy(z, labels, None, True, log_prob_keep_mask=keep)

    check(call, definition, logits, roundings=1.5)
    poisoned = torch.where(keep | torch.nn.functional.one_hot(labels.clamp(min=0), VOCAB).bool(), logits, torch.nan)
    assert torch.equal(call(poisoned)[0], call(logits)[0])
    with pytest.raises(ValueError, match="expected a log_prob_keep_mask of"):
        slime.calculate_log_probs_and_entropy(logits, labels, None, log_prob_keep_mask=keep[:, :3])


def test_slime_without_tokens() -> None:
    logprobs, entropy = slime.calculate_log_probs_and_entropy(
        torch.randn(0, VOCAB), torch.zeros(0).long(), None, with_entropy=True
    )
    assert logprobs.shape == (0,)
    assert entropy is not None
    assert entropy.shape == (0,)


@DTYPES
@pytest.mark.parametrize("shape", [(13,), (5, 3)])
def test_verl_from_logits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits, labels = logits_of(*shape, dtype=dtype), labels_of(*shape)
    for inplace in (True, False):
        check(
            lambda z, inplace=inplace: verl.logprobs_from_logits(z, labels, inplace),
            lambda z: token_logprobs(z, labels)[0],
            logits,
        )
    check(verl.entropy_from_logits, lambda z: token_logprobs(z, labels)[1], logits)
    check(lambda z: verl.entropy_from_logits_with_chunking(z, 4), lambda z: token_logprobs(z, labels)[1], logits)


def test_the_gradient_takes_the_place_of_logits_that_are_no_leaf() -> None:
    labels = torch.randint(VOCAB, (6,))
    for call in (
        lambda z: verl.logprobs_from_logits(z, labels),
        lambda z: areal.gather_logprobs_entropy(z, labels, reuse_logits=True)[0],
    ):
        leaf = logits_of(6).requires_grad_()
        used = leaf * 1
        expected = used.detach().clone().requires_grad_()
        call(used).sum().backward()
        token_logprobs(expected, labels)[0].sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(used.detach(), expected.grad)
        torch.testing.assert_close(leaf.grad, expected.grad)
        # Rows that are not dense: the gradient is a new tensor, and nothing is refused.
        wide = torch.cat([leaf * 1, leaf * 1], 1).view(6, VOCAB, 2)[..., 0]
        before = wide.detach().clone()
        call(wide).sum().backward()
        assert torch.equal(wide.detach(), before)


@pytest.mark.usefixtures("megatron")
@DTYPES
def test_verl_with_megatron(dtype: torch.dtype) -> None:
    logits, labels = logits_of(3, 5, dtype=dtype), labels_of(3, 5)
    check(verl.vocab_parallel_entropy, lambda z: token_logprobs(z, labels)[1], logits)
    check(lambda z: verl.vocab_parallel_entropy_with_chunking(z, 2), lambda z: token_logprobs(z, labels)[1], logits)
    check(
        lambda z: verl.vocab_parallel_log_probs_from_logits(z, labels), lambda z: token_logprobs(z, labels)[0], logits
    )


@pytest.mark.parametrize("reduction", ["none", "Sum", "mean"])
def test_verl_from_hidden_states(reduction: str) -> None:
    weight, labels = torch.randn(VOCAB, 24) / 5, labels_of(2, 7)

    def definition(x: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropy = token_logprobs(x.reshape(14, 24) @ weight.double().t(), labels.reshape(-1), 0.8)
        return {"none": logprobs, "Sum": logprobs.sum(), "mean": logprobs.mean()}[reduction], entropy

    hidden = torch.randn(2, 7, 24) * 3
    check(lambda x: verl.linear_cross_entropy(x, weight, labels, 0.8, reduction), definition, hidden, bound=2e-6)


def test_verl_from_hidden_states_in_bf16() -> None:
    """The logits are not rounded, and the weight has its gradient."""
    hidden, weight, labels = torch.randn(14, 24).bfloat16(), torch.randn(VOCAB, 24).bfloat16(), labels_of(14)
    x, w = (t.double().requires_grad_() for t in (hidden, weight))
    expected, entropy = token_logprobs(x @ w.t(), labels)
    (expected.sum() + entropy.sum()).backward()
    for call in (verl.linear_cross_entropy, verl.FusedLinearForPPO(chunk_size=4)):
        a, b = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        got = call(a, b, labels)
        (got[0].sum() + got[1].sum()).backward()
        assert relative_error(got[0].detach(), expected.detach()) < 1e-6
        assert relative_error(got[1].detach(), entropy.detach()) < 1e-6
        for grad, exact in ((a.grad, x.grad), (b.grad, w.grad)):
            assert grad is not None
            assert exact is not None
            assert relative_error(grad, exact) < 4e-3


def test_verl_keeps_the_shape_in_its_module_only() -> None:
    hidden, weight, labels = torch.randn(2, 7, 24), torch.randn(VOCAB, 24), labels_of(2, 7)
    assert verl.linear_cross_entropy(hidden, weight, labels)[0].shape == (14,)
    logprobs, entropy = verl.FusedLinearForPPO()(hidden, weight, labels)
    assert logprobs.shape == entropy.shape == (2, 7)
    flat = token_logprobs(hidden.double() @ weight.double().t(), labels)
    assert relative_error(logprobs, flat[0]) < 1e-6
    assert relative_error(entropy, flat[1]) < 1e-6


@DTYPES
@pytest.mark.parametrize(("tokens", "chunk_size"), [(9, None), (9, 2), (7, 4), (1, None)])
def test_nemo_rl(dtype: torch.dtype, tokens: int, chunk_size: int | None) -> None:
    """Targets may be shorter than the padded logits."""
    logits, target = logits_of(3, 9, dtype=dtype), torch.randint(VOCAB, (3, tokens))
    if tokens > 1:
        check(
            lambda z: nemo_rl.from_parallel_logits_to_logprobs(z, target, 0, VOCAB, None, chunk_size=chunk_size),
            lambda z: next_token_logprobs(z[:, :tokens], target),
            logits,
        )
    got = nemo_rl.from_parallel_logits_to_logprobs(logits, target, 0, VOCAB, None)
    assert got.shape == (3, tokens - 1)


@DTYPES
def test_nemo_rl_next_tokens_and_entropy(dtype: torch.dtype) -> None:
    logits, target = logits_of(3, 9, dtype=dtype), torch.randint(VOCAB, (3, 9))
    call = nemo_rl.get_next_token_logprobs_from_logits
    check(lambda z: call(target, z), lambda z: next_token_logprobs(z, target), logits)
    check(
        lambda z: nemo_rl.ChunkedDistributedEntropy.apply(z, 4, None),
        lambda z: -token_logprobs(z, target)[1],
        logits,
    )


@DTYPES
@pytest.mark.parametrize("length", [4, 9, 12])
def test_nemo_rl_packed(dtype: torch.dtype, length: int) -> None:
    """Sequences of 3, 0, 9, 1 and 4 tokens, and two tokens of none; NaN logits of one do not reach another."""
    boundaries = [0, 3, 3, 12, 13, 17]
    logits, tokens = logits_of(1, 19, dtype=dtype), torch.randint(VOCAB, (1, 19))
    cu = torch.tensor(boundaries, dtype=torch.int32)
    call = nemo_rl.from_parallel_logits_to_logprobs_packed_sequences

    def definition(z: Tensor) -> Tensor:
        return packed_logprobs(z[0], tokens[0], boundaries, length - 1)

    check(lambda z: call(z, tokens, cu, length, 0, VOCAB, None, chunk_size=4), definition, logits)
    shifted = torch.cat([tokens[:, 1:], tokens[:, :1]], 1)
    check(lambda z: call(z, shifted, cu, length, 0, VOCAB, None, target_is_pre_rolled=True), definition, logits)
    poisoned = logits.clone()
    poisoned[0, :3], poisoned[0, 16:] = torch.nan, torch.nan
    got = call(poisoned, tokens, cu, length, 0, VOCAB, None)
    assert torch.equal(got[1:], call(logits, tokens, cu, length, 0, VOCAB, None)[1:])


def test_nemo_rl_from_hidden_states() -> None:
    hidden, weight, target = torch.randn(6, 2, 24), torch.randn(VOCAB, 24) / 5, torch.randint(VOCAB, (2, 6))
    check(
        lambda x: nemo_rl.from_parallel_hidden_states_to_logprobs(x, weight, None, target, 0, VOCAB, None),
        lambda x: next_token_logprobs((x @ weight.double().t()).transpose(0, 1), target),
        hidden,
        bound=1e-6,
    )


def test_nemo_rl_without_gradients() -> None:
    logits, target = logits_of(3, 9).requires_grad_(), torch.randint(VOCAB, (3, 9))
    cu, weight = torch.tensor([0, 9]), torch.randn(VOCAB, VOCAB)
    for got in (
        nemo_rl.from_parallel_logits_to_logprobs(logits, target, 0, VOCAB, None, True),
        nemo_rl.from_parallel_logits_to_logprobs_packed_sequences(logits[:1], target[:1], cu, 9, 0, VOCAB, None, True),
        nemo_rl.from_parallel_hidden_states_to_logprobs(logits, weight, None, target.t(), 0, VOCAB, None, True),
        nemo_rl.ChunkedDistributedEntropy.apply(logits, 4, None, True),
    ):
        assert not got.requires_grad


@dataclasses.dataclass
class Sampling:
    top_k: int | None = None
    top_p: float | None = 1.0


def test_what_nemo_rl_cannot_have() -> None:
    logits, target = logits_of(3, 9), torch.randint(VOCAB, (3, 9))
    call, following = nemo_rl.from_parallel_logits_to_logprobs, nemo_rl.get_next_token_logprobs_from_logits
    for sampling in (Sampling(), Sampling(top_k=-1), Sampling(top_p=None)):
        assert torch.equal(
            call(logits, target, 0, VOCAB, None, sampling_params=sampling), call(logits, target, 0, VOCAB, None)
        )
    for sampling in (Sampling(top_k=5), Sampling(top_p=0.9)):
        with pytest.raises(NotImplementedError, match="after top-k or top-p filtering"):
            call(logits, target, 0, VOCAB, None, sampling_params=sampling)
        with pytest.raises(NotImplementedError, match="after top-k or top-p filtering"):
            following(target, logits, sampling_params=sampling)
    with pytest.raises(ValueError, match="expected vocab_start_index 0 and vocab_end_index 200 on rank 0"):
        call(logits, target, 0, VOCAB - 1, None)
    with pytest.raises(ValueError, match="sequences of at most 9 tokens"):
        call(logits, torch.zeros(3, 10).long(), 0, VOCAB, None)
    with pytest.raises(ValueError, match="seq_index must be None"):
        following(target, logits, seq_index=torch.arange(9))
    with pytest.raises(ValueError, match="expected logits of three dimensions"):
        following(target[0], logits[0])


def test_an_impossible_label_is_nan_and_touches_nothing_else() -> None:
    logits, labels = logits_of(6), torch.randint(VOCAB, (6,))
    wrong = labels.clone()
    wrong[2] = VOCAB
    for call in (
        lambda y: areal.gather_logprobs(logits, y),
        lambda y: slime.calculate_log_probs_and_entropy(logits, y, None)[0][:, 0],
        lambda y: verl.logprobs_from_logits(logits, y),
    ):
        got, expected = call(wrong), call(labels)
        assert got[2].isnan()
        others = torch.arange(6) != 2
        assert torch.equal(got[others], expected[others])
