"""The output layer over two tensor-parallel ranks, against one rank and float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_fp32.config import Fp32Config
from megatron_fp32.ops.logits.reference import gradients_reference, relative_error
from megatron_fp32.output_layer.layer import to_fp32_output_layer
from megatron_fp32.testing.cpu import cpu_megatron, model_parallel, single_process
from megatron_fp32.testing.ranks import RankPool

HIDDEN, VOCAB, TOKENS, MICRO_BATCHES = 64, 96, (8, 2), 3
RANKS = 2

Pool = Callable[[int], RankPool]
LAYOUTS = pytest.mark.parametrize("sequence_parallel", [False, True], ids=["tp2", "tp2+sp"])


def train(
    tensor: int,
    sequence_parallel: bool,
    weight: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    fields: dict[str, Any],
    attributes: dict[str, Any],
    fp32: Fp32Config,
    frozen: bool,
) -> dict[str, Any]:
    """On one rank: forward and backward of every micro-batch with this rank's slices of everything."""
    with model_parallel(tensor=tensor):
        rank = torch.distributed.get_rank()
        config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=4,
            params_dtype=weight.dtype,
            bf16=weight.dtype == torch.bfloat16,
            tensor_model_parallel_size=tensor,
            sequence_parallel=sequence_parallel,
        )
        built = ColumnParallelLinear(
            HIDDEN, VOCAB, config=config, init_method=torch.nn.init.zeros_, bias=False, **fields
        )
        layer: Any = to_fp32_output_layer(built, fp32)
        with torch.no_grad():
            layer.weight.copy_(weight.chunk(tensor)[rank])
        # As DistributedDataParallel leaves it.
        layer.weight.main_grad = torch.zeros(layer.weight.shape)
        layer.weight.grad_added_to_main_grad = False
        layer.weight.requires_grad_(not frozen)
        logits, hidden_grads = [], []
        for hidden, grad in batches:
            mine = (hidden.chunk(tensor)[rank] if sequence_parallel else hidden).clone().requires_grad_()
            out, _ = layer(mine, **attributes)
            gathered = out.shape[-1] == VOCAB
            # A slice of the last dimension, which is not contiguous; a copy in another order of the others, either.
            mine_grad = grad if gathered else grad.chunk(tensor, -1)[rank]
            out.backward(mine_grad.transpose(0, 1).contiguous().transpose(0, 1) if frozen else mine_grad)
            logits.append(out.detach())
            hidden_grads.append(mine.grad)
        assert layer.weight.grad_added_to_main_grad != frozen
        assert layer.fp32_calls == len(batches)
        return {"logits": logits, "dX": hidden_grads, "dW": layer.weight.main_grad}


def run(
    ranks: Pool,
    tensor: int,
    sequence_parallel: bool,
    weight: Tensor,
    batches: list[tuple[Tensor, Tensor]],
    fields: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
    *,
    fp32: Fp32Config | None = None,
    frozen: bool = False,
) -> list[dict[str, Any]]:
    args = (tensor, sequence_parallel, weight, batches, fields or {}, attributes or {}, fp32 or Fp32Config(), frozen)
    if tensor > 1:
        return ranks(tensor).run(train, *args)
    with cpu_megatron(), single_process():
        return [train(*args)]


def whole(answers: list[dict[str, Any]], sequence_parallel: bool = False) -> dict[str, Tensor]:
    """The global tensors, from what each rank holds of them."""
    if not sequence_parallel:
        for answer in answers[1:]:  # replicated, to the bit
            assert all(torch.equal(a, b) for a, b in zip(answer["dX"], answers[0]["dX"], strict=True))
    pieces = answers if sequence_parallel else answers[:1]
    return {
        "logits": torch.stack([torch.cat(shards, -1) for shards in zip(*(a["logits"] for a in answers), strict=True)]),
        "dX": torch.stack([torch.cat(shards) for shards in zip(*(a["dX"] for a in pieces), strict=True)]),
        "dW": torch.cat([a["dW"] for a in answers]),
    }


def truth_of(weight: Tensor, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    parts = [gradients_reference(hidden, weight, grad) for hidden, grad in batches]
    return {
        "logits": torch.stack([p.logits for p in parts]),
        "dX": torch.stack([p.hidden_grad for p in parts]),
        "dW": torch.stack([p.weight_grad for p in parts]).sum(0),
    }


def random_problem(dtype: torch.dtype) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    weight = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).to(dtype)
    return weight, [(torch.randn(*TOKENS, HIDDEN).to(dtype), torch.randn(*TOKENS, VOCAB)) for _ in range(MICRO_BATCHES)]


@pytest.fixture
def integer_problem() -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Sums of products that fp32 holds exactly."""

    def draw(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape).bfloat16()

    batches = [(draw(*TOKENS, HIDDEN), draw(*TOKENS, VOCAB).float()) for _ in range(MICRO_BATCHES)]
    return draw(VOCAB, HIDDEN), batches


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_errors_are_those_of_one_rank(ranks: Pool, sequence_parallel: bool, dtype: torch.dtype) -> None:
    weight, batches = random_problem(dtype)
    truth = truth_of(weight, batches)
    one = whole(run(ranks, 1, False, weight, batches))
    two = whole(run(ranks, RANKS, sequence_parallel, weight, batches), sequence_parallel)
    for name, true in truth.items():
        assert two[name].shape == true.shape, name
        assert relative_error(two[name], true) <= 1.5 * relative_error(one[name], true), name


@LAYOUTS
def test_integers_are_bit_exact(ranks: Pool, sequence_parallel: bool, integer_problem: Any) -> None:
    weight, batches = integer_problem
    truth = truth_of(weight, batches)
    got = whole(run(ranks, RANKS, sequence_parallel, weight, batches), sequence_parallel)
    assert torch.equal(got["logits"].double(), truth["logits"])
    assert torch.equal(got["dX"], truth["dX"].bfloat16())  # summed over the ranks in fp32, then rounded once
    assert torch.equal(got["dW"].double(), truth["dW"])


@LAYOUTS
@pytest.mark.parametrize(
    ("fields", "attributes"),
    [({"gather_output": True}, {}), ({}, {"runtime_gather_output": True})],
    ids=["gather_output", "runtime_gather_output"],
)
def test_15_gathered_logits_are_whole_on_every_rank(
    ranks: Pool, sequence_parallel: bool, fields: dict[str, Any], attributes: dict[str, Any], integer_problem: Any
) -> None:
    weight, batches = integer_problem
    truth = truth_of(weight, batches)
    answers = run(ranks, RANKS, sequence_parallel, weight, batches, fields, attributes)
    for answer in answers:
        assert torch.equal(torch.stack(answer["logits"]).double(), truth["logits"])
    shards = [{**a, "logits": [x.chunk(RANKS, -1)[r] for x in a["logits"]]} for r, a in enumerate(answers)]
    got = whole(shards, sequence_parallel)
    assert torch.equal(got["dX"], truth["dX"].bfloat16())
    assert torch.equal(got["dW"].double(), truth["dW"])


def test_15_runtime_gather_output_wins_over_the_constructors(ranks: Pool, integer_problem: Any) -> None:
    weight, batches = integer_problem
    answers = run(ranks, RANKS, False, weight, batches, {"gather_output": True}, {"runtime_gather_output": False})
    assert torch.equal(whole(answers)["logits"].double(), truth_of(weight, batches)["logits"])


def test_13_the_hidden_gradient_is_left_unsummed_where_megatron_leaves_it(ranks: Pool, integer_problem: Any) -> None:
    weight, batches = integer_problem
    answers = run(ranks, RANKS, False, weight, batches, {"disable_grad_reduce": True})
    for rank, answer in enumerate(answers):
        for (hidden, grad), mine in zip(batches, answer["dX"], strict=True):
            part = gradients_reference(hidden, weight.chunk(RANKS)[rank], grad.chunk(RANKS, -1)[rank])
            assert torch.equal(mine, part.hidden_grad.bfloat16())


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_four_ranks_are_bit_exact_too(ranks: Pool, sequence_parallel: bool, integer_problem: Any) -> None:
    weight, batches = integer_problem
    truth = truth_of(weight, batches)
    got = whole(run(ranks, 4, sequence_parallel, weight, batches), sequence_parallel)
    assert torch.equal(got["logits"].double(), truth["logits"])
    assert torch.equal(got["dX"], truth["dX"].bfloat16())
    assert torch.equal(got["dW"].double(), truth["dW"])


@LAYOUTS
@pytest.mark.parametrize("precision", ["bf16x2", "bf16x3"])
def test_09_split_gradients_of_an_fp32_residual_stream(ranks: Pool, sequence_parallel: bool, precision: Any) -> None:
    weight, batches = random_problem(torch.bfloat16)
    batches = [(torch.randn_like(hidden, dtype=torch.float32), grad) for hidden, grad in batches]
    fp32 = Fp32Config(grad_precision=precision)
    truth = truth_of(weight, batches)
    one = whole(run(ranks, 1, False, weight, batches, fp32=fp32))
    two = whole(run(ranks, RANKS, sequence_parallel, weight, batches, fp32=fp32), sequence_parallel)
    bits = {"bf16x2": 15, "bf16x3": 20}[precision]
    for name, true in truth.items():
        assert relative_error(one[name], true) <= 2.0**-bits, name
        assert relative_error(two[name], true) <= 1.5 * relative_error(one[name], true), name
    assert two["dX"].dtype == torch.float32


@LAYOUTS
def test_14_a_frozen_head_and_a_gradient_of_odd_strides(
    ranks: Pool, sequence_parallel: bool, integer_problem: Any
) -> None:
    """megatron-core up to 0.18 returns what it was to reduce unreduced when it is not contiguous."""
    weight, batches = integer_problem
    truth = truth_of(weight, batches)
    one = whole(run(ranks, 1, False, weight, batches, frozen=True))
    got = whole(run(ranks, RANKS, sequence_parallel, weight, batches, frozen=True), sequence_parallel)
    assert torch.equal(got["dX"], truth["dX"].bfloat16())
    assert torch.equal(got["dX"], one["dX"])
    assert not got["dW"].any()


@LAYOUTS
def test_13_no_tokens_at_all(ranks: Pool, sequence_parallel: bool) -> None:
    weight, _ = random_problem(torch.bfloat16)
    nothing = [(torch.empty(0, 2, HIDDEN).bfloat16(), torch.empty(0, 2, VOCAB))]
    got = whole(run(ranks, RANKS, sequence_parallel, weight, nothing), sequence_parallel)
    assert got["logits"].shape == (1, 0, 2, VOCAB)
    assert got["dX"].shape == (1, 0, 2, HIDDEN)
    assert not got["dW"].any()
