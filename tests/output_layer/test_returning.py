"""Results of the output layer out of Megatron's models, in place of logits, against float64."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor, nn

from megatron_fp32.apply import apply_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import Logprobs, SelectedLogprobs, WeightedLoss
from megatron_fp32.output_layer.layer import to_fp32_output_layer
from megatron_fp32.output_layer.requests import (
    LogprobsRequest,
    SelectedLogprobsRequest,
    TopLogprobsRequest,
    TruncatedLogprobsRequest,
    WeightedLossRequest,
)
from megatron_fp32.results import returning
from tests.output_layer.layers import LENGTH, VOCAB, SoftCapped, fill, gpt, hybrid, inputs, scaled_layer

pytestmark = pytest.mark.usefixtures("megatron")

EXACT = Fp32Config(gated_delta_net=(), grad_precision="bf16x3")
FUSED = Fp32Config(gated_delta_net=(), grad_precision="bf16x3", fused_loss="recompute")
MODELS: dict[str, Callable[[], Any]] = {
    "gpt": gpt,
    "tied": functools.partial(gpt, tied=True),
    "mtp": functools.partial(gpt, mtp=2),
    "hybrid": hybrid,
}
Exact = Callable[[Tensor, Tensor], tuple[Any, ...]]


def drawn(*shape: int) -> Tensor:
    return torch.rand(2, LENGTH, *shape, generator=torch.Generator().manual_seed(1))


def of_labels() -> tuple[Any, Exact]:
    temperature = drawn() + 0.5

    def exact(logits: Tensor, labels: Tensor) -> tuple[Any, ...]:
        logits = logits / temperature.double()[..., None]
        logp = logits.log_softmax(-1)
        top = logp.topk(3)
        label = logp.gather(2, labels[..., None])[..., 0]
        entropy = -(logp.exp() * logp).sum(-1)
        return label, entropy, logits.logsumexp(-1), logits.mean(-1), top.values.detach(), top.indices

    return LogprobsRequest(temperature=temperature, top_k=3, mean_logit=True, backward="saved"), exact


def selected(logits: Tensor, tokens: Tensor) -> tuple[Any, ...]:
    logp = logits.log_softmax(-1)
    chosen = torch.zeros_like(logits).scatter(2, tokens, 1.0).bool()
    rest = logp.masked_fill(chosen, -torch.inf).logsumexp(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(2, tokens), logits.gather(2, tokens), tokens, rest, entropy, logits.logsumexp(-1)


def of_tokens() -> tuple[Any, Exact]:
    tokens = drawn(VOCAB).argsort(-1)[..., :4]
    return SelectedLogprobsRequest(tokens=tokens), lambda logits, labels: selected(logits, tokens)


def of_top() -> tuple[Any, Exact]:
    return TopLogprobsRequest(k=5, temperature=0.7), lambda logits, labels: selected(
        logits / 0.7, logits.topk(5).indices
    )


def truncated(logits: Tensor, labels: Tensor, kept: Tensor) -> tuple[Any, ...]:
    kept = kept.scatter(2, labels[..., None], True)
    logp = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(~kept, 0.0)).sum(-1)
    mass = logits.log_softmax(-1).masked_fill(~kept, -torch.inf).logsumexp(-1)
    return logp.gather(2, labels[..., None])[..., 0], entropy, mass.detach()


def of_kept_tokens() -> tuple[Any, Exact]:
    tokens = drawn(VOCAB).argsort(-1)[..., :6]

    def exact(logits: Tensor, labels: Tensor) -> tuple[Any, ...]:
        return truncated(logits, labels, torch.zeros_like(logits, dtype=torch.bool).scatter(2, tokens, True))

    return TruncatedLogprobsRequest(kept_tokens=tokens), exact


def of_threshold() -> tuple[Any, Exact]:
    # Below the mean probability, also where all of them are almost equal.
    least = torch.full((2, LENGTH), -math.log(VOCAB))

    def exact(logits: Tensor, labels: Tensor) -> tuple[Any, ...]:
        return truncated(logits, labels, logits.log_softmax(-1) >= least[..., None])

    return TruncatedLogprobsRequest(min_logprob=least), exact


def of_weights() -> tuple[Any, Exact]:
    weights = drawn()

    def exact(logits: Tensor, labels: Tensor) -> tuple[Any, ...]:
        losses = -logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]
        return (losses * weights).sum(), losses.detach()

    return WeightedLossRequest(loss_weights=weights, grad_scale=0.25), exact


REQUESTS = {
    "labels": of_labels, "tokens": of_tokens, "top": of_top, "kept": of_kept_tokens, "threshold": of_threshold,
    "weights": of_weights,
}  # fmt: skip


def built(name: str, config: Fp32Config = EXACT) -> tuple[Any, list[Tensor]]:
    """A model, and where its output layer's inputs are recorded; the last one is the model's own."""
    MTPLossLoggingHelper.tracker = {}
    model = MODELS[name]()
    fill(model)
    apply_fp32(model, config, weights="initialized")
    seen: list[Tensor] = []
    model.output_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return model, seen


def weight_of(model: Any) -> Tensor:
    weight: Tensor | None = model.output_layer.weight
    return model.shared_embedding_or_output_weight() if weight is None else weight  # type: ignore[no-any-return]


def total_of(results: Any) -> Tensor:
    """A sum with random cotangents; a weighted loss has one cotangent only, its grad_scale."""
    if len(results) == 2:
        return results[0] * 0.25  # type: ignore[no-any-return]
    torch.manual_seed(7)
    return sum((x * torch.randn(x.shape)).sum() for x in results if x.requires_grad)  # type: ignore[return-value]


@pytest.mark.parametrize("config", [EXACT, FUSED], ids=["logits", "fused"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", REQUESTS)
def test_results_and_gradients(name: str, kind: str, config: Fp32Config) -> None:
    request, exact = REQUESTS[kind]()
    model, seen = built(name, config)
    batch = inputs()
    with returning(model, request):
        results = model(**batch)
    hidden, weight = seen[-1], weight_of(model)
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = exact((x @ w.t()).transpose(0, 1), batch["labels"])
    for field, ours, value in zip(results._fields, results, expected, strict=True):
        assert ours.shape == value.shape
        assert ours.is_contiguous()
        assert relative_error(ours.detach().double(), value.detach().double()) < 1e-6, field
    grad_x, grad_w = torch.autograd.grad(total_of(expected), (x, w))
    # A tied weight has gradients from the embedding, too, and multi-token prediction adds its own.
    of_head = [hidden] if name in ("tied", "mtp") else [hidden, weight]
    found = torch.autograd.grad(total_of(results), of_head)
    # dX has been rounded to bf16 once; so has dW, which does not go into a main_grad here.
    for ours, value in zip(found, (grad_x, grad_w)[: len(of_head)], strict=True):
        assert relative_error(ours.double(), value) < 2.0**-8


@pytest.mark.parametrize("config", [EXACT, FUSED], ids=["logits", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_on_its_loss(name: str, config: Fp32Config) -> None:
    """Also the losses of multi-token prediction and their gradients are as without a request."""
    runs = []
    for wanted in (False, True):
        model, _ = built(name, config)
        if wanted:
            with returning(model, LogprobsRequest()):
                loss = -model(**inputs()).logprobs
        else:
            loss = model(**inputs())
        loss.sum().backward()
        tracked = {k: v for k, v in MTPLossLoggingHelper.tracker.items() if isinstance(v, Tensor)}
        assert bool(tracked) == (name == "mtp")
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        runs.append({"loss": loss.detach(), **tracked, **grads})
    assert runs[0].keys() == runs[1].keys()
    for key, value in runs[0].items():
        assert relative_error(runs[1][key], value) < (1e-6 if key == "loss" else 1e-2), key


@pytest.mark.parametrize("name", ["gpt", "hybrid"])
def test_a_model_without_labels(name: str) -> None:
    request, exact = of_top()
    model, seen = built(name)
    with returning(model, request):
        results = model(**inputs(labels=False))
    logits = (seen[-1].double() @ weight_of(model).double().t()).transpose(0, 1)
    for ours, value in zip(results, exact(logits, inputs()["labels"]), strict=True):
        assert relative_error(ours.detach().double(), value.detach().double()) < 1e-6


def test_an_ignored_label_and_a_masked_position_have_zeros() -> None:
    model, _ = built("gpt")
    batch, mask = inputs(), torch.ones(2, LENGTH, dtype=torch.bool)
    batch["labels"][1, 3], mask[1, 3] = -100, False
    tokens = drawn(VOCAB).argsort(-1)[..., :4]
    tokens[1, 3] = -100
    for request in (LogprobsRequest(), TopLogprobsRequest(k=2, mask=mask), SelectedLogprobsRequest(tokens=tokens)):
        with returning(model, request):
            results = model(**batch)
        for field in ("logprobs", "entropy", "logsumexp"):
            assert not getattr(results, field)[1, 3].any()
            assert getattr(results, field)[0, 3].all()


def test_float16module_makes_a_plain_tuple() -> None:
    model, _ = built("gpt")
    wrapped = Float16Module(model.config, model)
    with returning(wrapped, LogprobsRequest(top_k=2)):
        out = wrapped(**inputs())
        named = model(**inputs())
    assert isinstance(named, Logprobs)
    assert torch.equal(Logprobs(*out).top_logprobs, named.top_logprobs)  # type: ignore[arg-type]


def test_mup() -> None:
    class Scaled(GPTModel):  # type: ignore[misc]
        def _postprocess(self, hidden_states: Tensor, labels: Tensor, **others: Any) -> Any:
            logits = 0.5 * self.output_layer(hidden_states)[0] * 0.5
            return self.compute_language_model_loss(labels, logits)

    model, seen = built("gpt")
    model.__class__ = Scaled
    batch = inputs()
    with returning(model, LogprobsRequest()):
        out = model(**batch)
    exact = (seen[0].double() @ weight_of(model).double().t() * 0.25).log_softmax(-1).transpose(0, 1)
    assert relative_error(out.logprobs.detach(), exact.gather(2, batch["labels"][..., None])[..., 0]) < 1e-6


@pytest.mark.parametrize("mtp", [None, 1], ids=["plain", "mtp"])
@pytest.mark.parametrize("config", [EXACT, FUSED], ids=["logits", "fused"])
def test_packed_sequences(mtp: int | None, config: Fp32Config) -> None:
    """Each token of a pack has what it has in a batch with its sequence alone."""
    MTPLossLoggingHelper.tracker = {}
    model = gpt(attention=False, mtp=mtp)
    fill(model)
    apply_fp32(model, config, weights="initialized")
    bounds = torch.tensor([0, 5, 6, LENGTH], dtype=torch.int32)
    pack = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=10, max_seqlen_kv=10
    )
    batch = {key: value[:1] for key, value in inputs().items()}
    for end in bounds[1:]:
        batch["labels"][0, end - 1] = -100
    with returning(model, LogprobsRequest(top_k=2)):
        whole = model(**batch, packed_seq_params=pack)
        loss_of_whole = whole.logprobs
        alone = [
            model(**{key: x[:, a:b] for key, x in batch.items() if key != "attention_mask"}, attention_mask=None)
            for a, b in itertools.pairwise(bounds)
        ]
    for field in ("logprobs", "entropy", "logsumexp", "top_logprobs"):
        pieces = torch.cat([getattr(results, field) for results in alone], 1)
        assert relative_error(getattr(whole, field).detach(), pieces.detach()) < 1e-6
    assert not loss_of_whole[0, bounds[1:].long() - 1].any()
    if config is FUSED:
        assert torch.equal(model(**batch, packed_seq_params=pack), -loss_of_whole)


class TestTheBlock:
    def test_it_leaves_no_trace(self) -> None:
        for config in (EXACT, FUSED):
            model, _ = built("gpt", config)
            before = {name: dict(vars(part)) for name, part in (("model", model), ("head", model.output_layer))}
            hooks = [len(model._forward_hooks), len(model._forward_pre_hooks)]
            expected = model(**inputs())
            with contextlib.suppress(KeyError), returning(model, LogprobsRequest()):
                model(**inputs())
                raise KeyError
            assert {"model": vars(model).keys(), "head": vars(model.output_layer).keys()} == {
                name: part.keys() for name, part in before.items()
            }
            assert vars(model).get("compute_language_model_loss") == before["model"].get("compute_language_model_loss")
            assert [len(model._forward_hooks), len(model._forward_pre_hooks)] == hooks
            assert torch.equal(model(**inputs()), expected)

    def test_hooks_on_the_output_layer_run_once_and_the_product_is_counted(self) -> None:
        model, _ = built("gpt")
        seen: list[str] = []
        model.output_layer.register_forward_hook(lambda _, args, output: seen.append(type(output[0]).__name__))
        with returning(model, LogprobsRequest()):
            model(**inputs())
        assert seen == ["DeferredResults"]
        assert model.output_layer.fp32_calls == 1

    def test_a_stage_without_an_output_layer_returns_what_it_always_does(self) -> None:
        stage = gpt(post_process=False)
        apply_fp32(stage, EXACT, weights="initialized")
        with returning(stage, LogprobsRequest()):
            hidden = stage(**inputs(labels=False))
        assert hidden.shape == (LENGTH, 2, 64)

    def test_chunks(self) -> None:
        first, (last, _) = gpt(post_process=False), built("gpt")
        with returning([first, last], TopLogprobsRequest(k=2)):
            assert isinstance(last(**inputs()), SelectedLogprobs)

    def test_blocks_do_not_nest(self) -> None:
        model, _ = built("gpt")
        with returning(model, LogprobsRequest()):
            with pytest.raises(RuntimeError, match="is in a block of `returning` already"):
                returning(model, TopLogprobsRequest(k=2)).__enter__()
            assert isinstance(model(**inputs()), Logprobs)
        assert model(**inputs()).shape == (2, LENGTH)

    def test_a_model_that_did_not_run(self) -> None:
        model, _ = built("gpt")
        with (
            pytest.raises(RuntimeError, match="the GPTModel was not called in the block"),
            returning(model, LogprobsRequest()),
        ):
            pass

    def test_a_model_that_ran_without_its_hooks(self) -> None:
        model, _ = built("gpt")
        with pytest.raises(RuntimeError, match="whose hooks must run"), returning(model, LogprobsRequest()):
            model.forward(**inputs())

    def test_a_model_that_changes_its_labels(self) -> None:
        model, _ = built("gpt")

        class Shifted(type(model)):  # type: ignore[misc]
            def forward(self, *args: Any, labels: Tensor, **kwargs: Any) -> Any:
                return super().forward(*args, labels=labels.clone(), **kwargs)

        model.__class__ = Shifted
        message = "this Shifted computed the results 0 times in a forward pass, not once"
        with pytest.raises(RuntimeError, match=message), returning(model, LogprobsRequest()):
            model(**inputs())


class TestRefusals:
    @pytest.mark.parametrize("request_", [LogprobsRequest(), of_weights()[0]])
    def test_labels_are_missing(self, request_: Any) -> None:
        model, seen = built("gpt")
        with pytest.raises(ValueError, match="needs labels: pass them to the model"), returning(model, request_):
            model(**inputs(labels=False))
        assert not seen

    @pytest.mark.parametrize("name", ["gpt", "hybrid"])
    def test_an_inference_context(self, name: str) -> None:
        model, _ = built(name)
        with pytest.raises(ValueError, match="got an inference context"), returning(model, LogprobsRequest()):
            model(**inputs(), inference_context=object())

    def test_no_request(self) -> None:
        with pytest.raises(TypeError, match=r"request must be one of LogprobsRequest, .*, got 'top'"):
            returning(gpt(), "top").__enter__()  # type: ignore[arg-type]

    def test_models(self) -> None:
        plain, soft, biased, two = gpt(), gpt(), gpt(), nn.Module()
        soft.output_layer.__class__ = SoftCapped
        biased.output_layer = scaled_layer(bias=True, skip_bias_add=False)
        for model in (soft, biased):
            apply_fp32(model, EXACT, weights="initialized")
        two.a, two.b = built("gpt")[0], built("gpt")[0]
        wrapped = built("gpt")[0]
        wrapper = nn.Module()
        wrapper.to_wrap, wrapped.output_layer = wrapped.output_layer, wrapper
        alone = nn.Module()
        alone.output_layer = to_fp32_output_layer(scaled_layer(), EXACT)
        for model, kind, message in (
            (plain, TypeError, "expected output_layer to be an Fp32OutputLayer, got ColumnParallelLinear: call apply"),
            (soft, ValueError, "would be lost"),
            (biased, ValueError, "with a bias"),
            (two, ValueError, "expected one output layer, found a.output_layer, b.output_layer"),
            (wrapped, ValueError, "the LoRA layer around output_layer.to_wrap adds"),
            (alone, ValueError, "in a megatron-core language model .* got a Module"),
            (nn.Module(), ValueError, "no module called output_layer"),
        ):
            with pytest.raises(kind, match=message):
                returning(model, LogprobsRequest()).__enter__()

    @pytest.mark.parametrize(
        ("make", "kind", "message"),
        [
            (lambda: SelectedLogprobsRequest(tokens=torch.zeros(2, 3)), ValueError, r"tokens must be .* \(2, 3\)"),
            (lambda: SelectedLogprobsRequest(tokens=[1]), TypeError, r"tokens must be a tensor \[b, s, K\], got \[1\]"),
            (
                lambda: LogprobsRequest(temperature=torch.ones(1, 2, 3)),
                ValueError,
                "temperature must broadcast",
            ),
            (lambda: TopLogprobsRequest(k=0), ValueError, "k must be at least 1"),
            (lambda: TopLogprobsRequest(k=1, mask=torch.ones(3)), ValueError, "mask must be"),
            (lambda: TruncatedLogprobsRequest(), ValueError, "expected kept_tokens or min_logprob, and not both"),
            (lambda: TruncatedLogprobsRequest(min_logprob=torch.ones(3)), ValueError, "min_logprob must be"),
            (lambda: WeightedLossRequest(loss_weights=1.0, grad_scale=1.0), TypeError, "loss_weights must be"),
            (lambda: LogprobsRequest(chunk_size=0), ValueError, "chunk_size must be"),
        ],
    )
    def test_fields(self, make: Callable[[], Any], kind: type[Exception], message: str) -> None:
        with pytest.raises(kind, match=message):
            make()

    def test_another_gradient_than_was_said(self) -> None:
        model, _ = built("gpt")
        with returning(model, WeightedLossRequest(loss_weights=torch.ones(2, LENGTH), grad_scale=0.5)):
            out = model(**inputs())
        assert isinstance(out, WeightedLoss)
        with pytest.raises(RuntimeError, match="grad_scale"):
            out.total.backward()
