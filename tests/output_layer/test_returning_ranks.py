"""Results of the output layer on several ranks: tensor, context and pipeline parallelism, and Megatron's schedules."""

from __future__ import annotations

import contextlib
import itertools
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from megatron_fp32.apply import apply_fp32
from megatron_fp32.check import check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import Logprobs, WeightedLoss
from megatron_fp32.output_layer.requests import LogprobsRequest, SelectedLogprobsRequest, WeightedLossRequest
from megatron_fp32.results import returning
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from tests.output_layer.layers import LENGTH, VOCAB, fill, gpt, inputs
from tests.support import stock_model

Pool = Callable[[int], RankPool]

EXACT = Fp32Config(gated_delta_net=(), grad_precision="bf16x3")
FUSED = Fp32Config(gated_delta_net=(), grad_precision="bf16x3", fused_loss="recompute")


@contextlib.contextmanager
def built(config: Fp32Config, **fields: Any) -> Iterator[Any]:
    MTPLossLoggingHelper.tracker = {}
    with model_parallel(tensor=fields.get("tensor", 1), context=fields.get("context", 1)):
        if fields.get("sequence_parallel"):
            # The norms of the other model do not support it.
            sizes = {"tensor_model_parallel_size": fields["tensor"], "sequence_parallel": fields["tensor"] > 1}
            model = stock_model(model={"vocab_size": VOCAB}, **sizes)
        else:
            model = gpt(**fields)
        fill(model)
        apply_fp32(model, config, weights="initialized")
        yield model


def wrap(model: Any) -> Any:
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(model.config, ddp, Float16Module(model.config, model))
    wrapped.zero_grad_buffer()
    return wrapped


def drawn(*shape: int) -> Tensor:
    return torch.rand(2, LENGTH, *shape, generator=torch.Generator().manual_seed(1))


def step(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Results and gradients of two equal micro-batches under DDP; the whole operands of the head."""
    tokens, temperature = drawn(VOCAB).argsort(-1)[..., :3], drawn() + 0.5
    request: Any = SelectedLogprobsRequest(tokens=tokens, temperature=temperature)
    if kind == "labels":
        request = LogprobsRequest(temperature=temperature, mean_logit=True)
    with built(EXACT, **fields) as model:
        head, group = model.output_layer, parallel_state.get_tensor_model_parallel_group()
        whole = torch.randn(VOCAB, head.weight.shape[1], generator=torch.Generator().manual_seed(2)).mul_(0.2)
        with torch.no_grad():
            head.weight.copy_(whole.chunk(group.size())[group.rank()])
        seen: list[Tensor] = []
        head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        wrapped = wrap(model)
        for _ in range(2):
            with returning(wrapped, request):
                results = wrapped(**inputs())
            seen[-1].retain_grad()
            total_of(results).backward()
        check_fp32(wrapped, EXACT, after_forward=True)
        return {
            "results": [None if x is None else x.detach() for x in results],
            "hidden": seen[-1].detach(),
            "hidden_grad": seen[-1].grad,
            "weight": head.weight.detach().clone(),
            "weight_grad": head.weight.main_grad.clone(),
        }


def total_of(results: Any) -> Tensor:
    """The sum of the differentiable results times random numbers."""
    torch.manual_seed(7)
    return sum((x * torch.randn(x.shape)).sum() for x in results if x is not None and x.requires_grad)  # type: ignore[return-value]


def exact_results(kind: str, x: Tensor, w: Tensor) -> list[Tensor | None]:
    """Fields of `Logprobs` or `SelectedLogprobs` in float64, for hidden states [s, b, hidden] and the whole weight."""
    logits = (x @ w.t()).transpose(0, 1) / (drawn() + 0.5)[..., None]
    logp = logits.log_softmax(-1)
    entropy, logsumexp = -(logp.exp() * logp).sum(-1), logits.logsumexp(-1)
    if kind == "labels":
        return [logp.gather(2, inputs()["labels"][..., None])[..., 0], entropy, logsumexp, logits.mean(-1), None, None]
    tokens = drawn(VOCAB).argsort(-1)[..., :3]
    rest = logp.masked_fill(torch.zeros_like(logp).scatter(2, tokens, 1.0).bool(), -torch.inf).logsumexp(-1)
    return [logp.gather(2, tokens), logits.gather(2, tokens), tokens, rest, entropy, logsumexp]


@pytest.mark.parametrize("kind", ["labels", "tokens"])
@pytest.mark.parametrize(
    ("tensor", "fields"), [(2, {}), (4, {"mtp": 1}), (2, {"sequence_parallel": True})], ids=["TP2", "TP4-mtp", "TP2-SP"]
)
def test_tensor_parallel(ranks: Pool, kind: str, tensor: int, fields: dict[str, Any]) -> None:
    several = ranks(tensor).run(step, kind, {"tensor": tensor, **fields})
    of_sequence = "sequence_parallel" in fields
    hidden = torch.cat([mine["hidden"] for mine in several]) if of_sequence else several[0]["hidden"]
    x = hidden.double().requires_grad_()
    w = torch.cat([mine["weight"] for mine in several]).double().requires_grad_()
    expected = exact_results(kind, x, w)
    grad_x, grad_w = torch.autograd.grad(total_of(expected), (x, w))
    for i, mine in enumerate(several):
        for ours, value, first in zip(mine["results"], expected, several[0]["results"], strict=True):
            assert (ours is None) == (value is None)
            if value is not None:
                assert torch.equal(ours, first)
                assert ours.shape == value.shape
                assert relative_error(ours.double(), value.detach().double()) < 1e-6
        of_rank = grad_x.chunk(tensor)[i] if of_sequence else grad_x
        assert relative_error(mine["hidden_grad"].double(), of_rank) < 2.0**-8  # rounded to bf16 once
        if "mtp" not in fields:  # whose losses have a gradient, too
            assert relative_error(mine["weight_grad"].double(), 2 * grad_w.chunk(tensor)[i]) < 1e-5


# Context parallelism

PACK = [0, 4, 8, LENGTH]


def places_of(rank: int, context: int, bounds: list[int]) -> Tensor:
    """Megatron's places in the sequence of a context-parallel rank: of each document a piece and its mirror image."""
    pieces = [torch.arange(a, b).chunk(2 * context) for a, b in itertools.pairwise(bounds)]
    return torch.cat([torch.cat([of[rank], of[2 * context - rank - 1]]) for of in pieces])


def on_context_ranks(context: int, mtp: int | None, packed: bool) -> dict[str, Any]:
    """This rank's places, its results there, and the gradients, summed over the ranks."""
    with built(FUSED, context=context, mtp=mtp, attention=False) as model:
        group = parallel_state.get_context_parallel_group()
        places = places_of(dist.get_rank(group), context, PACK if packed else [0, LENGTH])
        batch = inputs()
        batch["labels"][0, 3] = -100
        batch = {key: x[:, places] for key, x in batch.items() if key != "attention_mask"}
        given: dict[str, Any] = {"attention_mask": None}
        if packed:
            batch = {key: x[:1] for key, x in batch.items()}
            bounds = torch.tensor(PACK, dtype=torch.int32)
            given["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=8, max_seqlen_kv=8
            )
        count = len(batch["labels"])
        temperature, cotangents = (drawn() + 0.5)[:count, places], drawn(2)[:count, places]
        with returning(model, LogprobsRequest(temperature=temperature, top_k=2)):
            results = model(**batch, **given)
        losses = model(**batch, **given)
        total = (results.logprobs * cotangents[..., 0]).sum() + (results.entropy * cotangents[..., 1]).sum()
        weights = [model.output_layer.weight, model.embedding.word_embeddings.weight]
        grads = [grad.float() for grad in torch.autograd.grad(total, weights)]
        for grad in grads:
            dist.all_reduce(grad, group=group)
        found = [results.logprobs, results.entropy, results.logsumexp, results.top_logprobs, losses]
        return {"places": places, "grads": grads, "found": [x.detach() for x in found]}


@pytest.mark.parametrize("packed", [False, True], ids=["sequences", "packed"])
@pytest.mark.parametrize("mtp", [None, 1], ids=["plain", "mtp"])
def test_context_parallel(ranks: Pool, mtp: int | None, packed: bool) -> None:
    """Each rank has the results of its places, and the gradients of all ranks together are those of one rank."""
    whole = ranks(1).run(on_context_ranks, 1, mtp, packed)[0]
    order = whole["places"].argsort()
    for mine in ranks(2).run(on_context_ranks, 2, mtp, packed):
        at = order[mine["places"]]
        for ours, value in zip(mine["found"], whole["found"], strict=True):
            assert relative_error(ours, value[:, at]) < 1e-6
        if mtp is None:  # its losses, whose gradients come too, are divided by the number of tokens of a rank
            for ours, value in zip(mine["grads"], whole["grads"], strict=True):
                assert relative_error(ours, value) < 2e-2


# Megatron's schedules

MASK = (drawn() < 0.8).float()
MICRO_BATCHES = 3


def train(kind: str, pipeline: int, per_token: bool) -> dict[str, Any]:
    """Losses and gradients of a step of Megatron's schedule, which gives `loss_func` what the model returned."""
    tokens = int(MASK.sum())
    after = 1.0 if per_token else 1 / tokens / MICRO_BATCHES  # what the schedule makes of the loss function's result

    def forward_step(batches: Iterator[dict[str, Any]], model: Any) -> tuple[Any, Callable[[Any], Any]]:
        requests = {"logprobs": LogprobsRequest(), "weights": WeightedLossRequest(loss_weights=MASK, grad_scale=after)}
        with returning(model, requests[kind]) if kind in requests else contextlib.nullcontext():
            out = model(**next(batches))

        def loss_func(out: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            if kind == "weights":
                loss = WeightedLoss(*out).total
            else:
                losses = -Logprobs(*out).logprobs if kind == "logprobs" else out
                loss = (losses * MASK).sum()
            return loss, torch.tensor(tokens, dtype=torch.int), {"loss": loss.detach().clone()}

        return out, loss_func

    with model_parallel(pipeline=pipeline):
        stage = dist.get_rank()
        model = gpt(
            num_layers=2, pipeline_model_parallel_size=pipeline, pre_process=stage == 0,
            post_process=stage == pipeline - 1, calculate_per_token_loss=per_token, pipeline_dtype=torch.bfloat16,
        )  # fmt: skip
        fill_by_name(model)
        apply_fp32(model, EXACT, weights="initialized")
        reported = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([{key: x.roll(i, -1) for key, x in inputs().items()} for i in range(MICRO_BATCHES)]),
            model=[wrap(model)],
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=2,
            forward_only=False,
        )
        grads = {"head": "output_layer.weight", "embedding": "embedding.word_embeddings.weight"}
        parameters = dict(model.named_parameters())
        found = {part: parameters[name].main_grad.clone() for part, name in grads.items() if name in parameters}
        return {"losses": [entry["loss"] for entry in reported], **found}


def fill_by_name(model: Any) -> None:
    """Random matrices, the same ones in every layer and on every pipeline stage."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            of_name = zlib.crc32(name.replace("layers.1.", "layers.0.").encode())
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(of_name)) * 0.05
            with torch.no_grad():
                parameter.copy_(values)


@pytest.mark.parametrize("per_token", [False, True], ids=["mean", "per-token"])
@pytest.mark.parametrize("kind", ["logprobs", "weights"])
def test_a_schedule(ranks: Pool, kind: str, per_token: bool) -> None:
    """One forward, one backward, with and without pipeline stages, against a schedule on the model's own loss."""
    exact = ranks(1).run(train, "loss", 1, per_token)[0]
    alone = ranks(1).run(train, kind, 1, per_token)[0]
    first, last = ranks(2).run(train, kind, 2, per_token)
    for ours in (alone, {**first, **last}):
        assert ours.keys() == exact.keys()
        for value, loss in zip(ours["losses"], exact["losses"], strict=True):
            assert relative_error(value, loss) < 1e-6
        # dW comes from the same hidden states; below the head, gradients have been rounded to bf16.
        assert relative_error(ours["head"], exact["head"]) < 1e-5
        assert relative_error(ours["embedding"], exact["embedding"]) < 2e-2
