"""Blocks of `returning`: what they change and undo, and what they refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fp32.apply import apply_fp32
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
from tests.output_layer.layers import LENGTH, SoftCapped, gpt, inputs, scaled_layer
from tests.output_layer.requested import (
    EXACT,
    FUSED,
    built,
    of_weights,
)

pytestmark = pytest.mark.usefixtures("megatron")


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
