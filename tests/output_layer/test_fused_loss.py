"""The loss of Megatron's models without logits, against the same models with fp32 logits."""

from __future__ import annotations

import functools
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

from megatron_fp32.apply import apply_fp32
from megatron_fp32.check import check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.output_layer.fused_loss import has_fused_loss
from megatron_fp32.output_layer.layer import to_fp32_output_layer
from megatron_fp32.output_layer.logprobs_processor import logprobs_processor
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.testing.training import Batch, Trainer
from tests.output_layer.layers import (
    FUSED,
    HIDDEN,
    LENGTH,
    VOCAB,
    SoftCapped,
    fill,
    gpt,
    hybrid,
    inputs,
    scaled_layer,
)  # fmt: skip
from tests.support import stock_model

Pool = Callable[[int], RankPool]


def step(config: Fp32Config, fields: dict[str, Any], overlap: bool = False) -> dict[str, Any]:
    """Loss and gradients of one micro-batch under DDP."""
    # megatron-core sizes this for the first model of a process.
    MTPLossLoggingHelper.tracker = {}
    with model_parallel(tensor=fields.get("tensor", 1)):
        if fields.get("sequence_parallel"):
            # The norms of the other model do not support it.
            sizes = {"tensor_model_parallel_size": fields["tensor"], "sequence_parallel": True}
            model = stock_model(model={"vocab_size": VOCAB}, **sizes)
        else:
            model = gpt(**fields)
        fill(model)
        apply_fp32(model, config, weights="initialized")
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=overlap, overlap_param_gather=overlap,
            overlap_grad_reduce=overlap,
        )  # fmt: skip
        wrapped = DistributedDataParallel(model.config, ddp, Float16Module(model.config, model))
        check_fp32(wrapped, config)
        wrapped.zero_grad_buffer()
        for _ in range(2):
            loss = wrapped(**inputs())
            loss.mean().backward()
        if overlap:
            wrapped.finish_grad_sync()
        check_fp32(wrapped, config, after_forward=True)
        return {
            "loss": loss.detach(),
            "calls": model.output_layer.fp32_calls,
            **{name: p.main_grad.clone() for name, p in model.named_parameters() if hasattr(p, "main_grad")},
        }


def assert_alike(ours: dict[str, Any], logits: dict[str, Any]) -> None:
    assert ours.keys() == logits.keys()
    assert ours["calls"] == logits["calls"]
    for name, value in ours.items():
        if name != "calls":
            # The loss is one of fp32; below the head, gradients have been rounded to bf16 at other places.
            assert relative_error(value, logits[name]) < (1e-6 if name == "loss" else 1e-2), name


@pytest.mark.parametrize("config", FUSED, ids=lambda config: config.fused_loss)
@pytest.mark.parametrize(
    "fields", [{}, {"tied": True}, {"mtp": 2}, {"mtp": 1, "tied": True}], ids=["plain", "tied", "mtp", "mtp-tied"]
)
def test_a_gpt_model(ranks: Pool, config: Fp32Config, fields: dict[str, Any]) -> None:
    assert_alike(ranks(1).run(step, config, fields)[0], ranks(1).run(step, Fp32Config(gated_delta_net=()), fields)[0])


@pytest.mark.parametrize(
    "fields", [{}, {"mtp": 1}, {"sequence_parallel": True}], ids=["plain", "mtp", "sequence-parallel"]
)
def test_two_ranks(ranks: Pool, fields: dict[str, Any]) -> None:
    fields = {"tensor": 2, **fields}
    ours = ranks(2).run(step, FUSED[0], fields)
    logits = ranks(2).run(step, Fp32Config(gated_delta_net=()), fields)
    for a, b in zip(ours, logits, strict=True):
        assert_alike(a, b)


def test_parameters_are_gathered_before_their_use(ranks: Pool) -> None:
    """With `overlap_param_gather`, DDP's hook on the output layer waits for its weight."""
    ours, logits = (ranks(2).run(step, config, {}, True) for config in (FUSED[0], Fp32Config(gated_delta_net=())))
    for a, b in zip(ours, logits, strict=True):
        assert_alike(a, b)


@pytest.mark.usefixtures("megatron")
class TestOneProcess:
    def test_without_labels_there_are_logits(self) -> None:
        model, plain = gpt(), gpt()
        plain.load_state_dict(model.state_dict())
        apply_fp32(model, FUSED[0], weights="initialized")
        apply_fp32(plain, Fp32Config(gated_delta_net=()), weights="initialized")
        logits = model(**inputs(labels=False))
        assert logits.shape == (2, LENGTH, VOCAB)
        assert torch.equal(logits, plain(**inputs(labels=False)))
        gathered, _ = model.output_layer(torch.randn(4, 1, HIDDEN).bfloat16(), runtime_gather_output=True)
        assert gathered.shape == (4, 1, VOCAB)

    def test_padding_of_the_vocabulary_gets_no_probability(self) -> None:
        model = gpt()
        with torch.no_grad():
            model.output_layer.weight[90:] = model.output_layer.weight[:6]
        batch = inputs()
        batch["labels"] %= 90
        apply_fp32(model, Fp32Config(gated_delta_net=(), fused_loss="recompute", vocab_size=90), weights="initialized")
        losses = model(**batch)
        logits = model(**{**batch, "labels": None}).double()
        exact = -logits[..., :90].log_softmax(-1).gather(2, batch["labels"][..., None])[..., 0]
        assert relative_error(losses.detach(), exact) < 1e-6

    def test_hooks_on_the_output_layer_run_once_and_backward_hooks_see_the_loss(self) -> None:
        model = gpt()
        apply_fp32(model, FUSED[0], weights="initialized")
        seen: list[str] = []
        head = model.output_layer
        head.register_forward_pre_hook(lambda *_: seen.append("before"))
        head.register_forward_hook(lambda _, args, output: seen.append(type(output[0]).__name__))
        head.register_forward_hook(lambda *_: seen.append("kwargs"), with_kwargs=True)
        head.register_full_backward_hook(lambda *_: seen.append("backward"))
        model(**inputs()).sum().backward()
        assert seen == ["before", "DeferredLogits", "kwargs", "backward"]
        assert [len(hooks) for hooks in (head._forward_pre_hooks, head._forward_hooks)] == [1, 2]

    def test_the_hooks_of_megatron_fsdp_run_around_every_use_of_the_weight(self) -> None:
        model = gpt()
        apply_fp32(model, FUSED[0], weights="initialized")
        seen: list[str] = []

        def gather(*_: Any) -> None:
            seen.append("gather")

        def release(*_: Any) -> None:
            seen.append("release")

        gather.__module__ = release.__module__ = "megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp"
        model.output_layer.register_forward_pre_hook(functools.partial(gather))
        model.output_layer.register_forward_hook(release)
        model(**inputs())
        assert seen == ["gather", "release"] * 2

    def test_it_can_be_undone(self) -> None:
        model = gpt()
        apply_fp32(model, FUSED[0], weights="initialized")
        assert has_fused_loss(model)
        apply_fp32(model, Fp32Config(gated_delta_net=()), weights="initialized")
        assert not has_fused_loss(model)
        assert "compute_language_model_loss" not in vars(model)
        assert model(**inputs()).shape == (2, LENGTH)

    def test_chunks_of_a_virtual_pipeline(self) -> None:
        chunks = [gpt(post_process=False), gpt()]
        report = apply_fp32(chunks, FUSED[0], weights="initialized")
        assert report.output_layers == ("chunk 1: output_layer",)
        assert [has_fused_loss(chunk) for chunk in chunks] == [False, True]

    def test_the_trainer_and_the_provider(self) -> None:
        model = stock_model()
        apply_fp32(model, Fp32Config(fused_loss="recompute"), weights="initialized")
        trainer = Trainer(model)
        losses = [trainer.step([Batch.random(model.vocab_size, seed=0)]) for _ in range(4)]
        assert losses[-1] < losses[0]

    def test_mup_scales_logits_that_are_not_there(self) -> None:
        layer = to_fp32_output_layer(scaled_layer(), FUSED[0])
        hidden, labels = torch.randn(5, 2, HIDDEN).bfloat16(), torch.randint(VOCAB, (2, 5))
        deferred, bias = layer(hidden)
        assert bias is None
        scaled = deferred * 0.5
        exact = (hidden.double() @ layer.weight.double().t() * 0.5).log_softmax(-1)
        expected = -exact.transpose(0, 1).gather(2, labels[..., None])[..., 0]
        assert relative_error(scaled.loss(labels).detach(), expected) < 1e-6
        assert relative_error(scaled.transpose(0, 1).detach(), (hidden @ layer.weight.t()).transpose(0, 1) * 0.5) < 1e-2

    def test_what_the_acceptance_rate_asks(self) -> None:
        layer = to_fp32_output_layer(scaled_layer(), FUSED[0])
        hidden = torch.randn(5, 2, HIDDEN).bfloat16()
        deferred, _ = layer(hidden)
        logits = deferred.logits()
        values, tokens = deferred.max(dim=-1)
        assert deferred.size(-1) == VOCAB
        assert torch.equal(tokens, logits.argmax(-1))
        assert torch.equal(torch.argmax(deferred, dim=-1), tokens)
        assert relative_error(values, logits.amax(-1).detach()) < 1e-6

    def test_anything_else_says_what_is_missing(self) -> None:
        deferred, _ = to_fp32_output_layer(scaled_layer(), FUSED[0])(torch.randn(5, 2, HIDDEN).bfloat16())
        for act in (
            lambda: torch.softmax(deferred, -1),
            lambda: deferred.shape,
            lambda: deferred.float(),
            lambda: pickle.dumps(deferred),
            lambda: deferred.max(dim=0),
            lambda: deferred * torch.ones(3),
        ):
            with pytest.raises((TypeError, AttributeError), match="logits"):
                act()

    def test_labels_that_are_ignored(self) -> None:
        model, batch = gpt(), inputs()
        apply_fp32(model, FUSED[0], weights="initialized")
        batch["labels"][:, 3] = -100
        losses = model(**batch)
        assert not losses[:, 3].any()
        assert losses.isfinite().all()


@pytest.mark.usefixtures("megatron")
def test_a_hybrid_model() -> None:
    model = hybrid()
    apply_fp32(model, Fp32Config(gated_delta_net=()), weights="initialized")
    expected = model(**inputs())
    apply_fp32(model, FUSED[0], weights="initialized")
    assert relative_error(model(**inputs()).detach(), expected.detach()) < 1e-6
    assert model(**inputs(labels=False)).shape == (2, LENGTH, VOCAB)


OFFERED = "output_processor" in inspect.signature(GPTModel.forward).parameters


@pytest.mark.usefixtures("megatron")
@pytest.mark.skipif(not OFFERED, reason="megatron-core < 0.18 has no output_processor")
class TestLogprobsProcessor:
    @pytest.mark.parametrize("config", [Fp32Config(gated_delta_net=()), FUSED[0]], ids=["logits", "fused"])
    @pytest.mark.parametrize("mtp", [None, 1])
    def test_log_probs_entropy_and_top_k(self, config: Fp32Config, mtp: int | None) -> None:
        model, batch, temperature = gpt(mtp=mtp), inputs(), torch.rand(2, LENGTH) + 0.5
        model.eval()
        apply_fp32(model, config, weights="initialized")
        out = model(**batch, output_processor=logprobs_processor(temperature=temperature, top_k=3))
        logits = model(**{**batch, "labels": None}).detach().double() / temperature[..., None]
        logp = logits.log_softmax(-1)
        assert relative_error(out.logprobs.detach(), logp.gather(2, batch["labels"][..., None])[..., 0]) < 1e-6
        assert relative_error(out.entropy.detach(), torch.special.entr(logp.exp()).sum(-1)) < 1e-6
        assert relative_error(out.top_logprobs, logp.topk(3).values) < 1e-6
        out.logprobs.sum().backward()
        assert model.output_layer.weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("shape", [(), (LENGTH,), (2, 1)], ids=str)
    def test_temperatures_broadcast_to_batch_and_sequence(self, shape: tuple[int, ...]) -> None:
        model, batch, temperature = gpt(), inputs(), torch.rand(shape) + 0.5
        model.eval()
        apply_fp32(model, FUSED[0], weights="initialized")
        out = model(**batch, output_processor=logprobs_processor(temperature=temperature))
        whole = model(**batch, output_processor=logprobs_processor(temperature=temperature.expand(2, LENGTH)))
        assert torch.equal(out.logprobs, whole.logprobs)

    def test_what_it_needs(self) -> None:
        model = gpt()
        with pytest.raises(TypeError, match="expected an Fp32OutputLayer, got ColumnParallelLinear"):
            model(**inputs(), output_processor=logprobs_processor())
        apply_fp32(model, FUSED[0], weights="initialized")
        with pytest.raises(ValueError, match="log-probs need labels"):
            model(**inputs(labels=False), output_processor=logprobs_processor())

    def test_layers_whose_logits_are_more_than_a_product(self) -> None:
        soft, biased = scaled_layer(), to_fp32_output_layer(scaled_layer(bias=True, skip_bias_add=False))
        soft.__class__ = SoftCapped
        given = {"hidden_states": torch.randn(5, 2, HIDDEN).bfloat16(), "output_weight": None}
        labels = torch.zeros(2, 5, dtype=torch.long)
        for layer, message in ((to_fp32_output_layer(soft), "would be lost"), (biased, "with a bias")):
            with pytest.raises(ValueError, match=message):
                logprobs_processor()(**given, output_layer=layer, labels=labels)

    def test_mup(self) -> None:
        layer = to_fp32_output_layer(scaled_layer(), FUSED[0])
        hidden, labels = torch.randn(5, 2, HIDDEN).bfloat16(), torch.randint(VOCAB, (2, 5))
        given = {"hidden_states": hidden, "output_layer": layer, "output_weight": None, "labels": labels}
        out = logprobs_processor()(**given, scale_logits=lambda logits: logits * 0.5, config=None)
        exact = (hidden.double() @ layer.weight.double().t() * 0.5).log_softmax(-1).transpose(0, 1)
        assert relative_error(out.logprobs.detach(), exact.gather(2, labels[..., None])[..., 0]) < 1e-6
