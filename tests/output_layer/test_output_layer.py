"""Turning a built output layer into an `Fp32OutputLayer`, and what it is then, on one rank."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from megatron_fp32.config import Fp32Config
from megatron_fp32.models.provider import build_model, cpu_overrides, transformer_config
from megatron_fp32.ops.logits.reference import gradients_reference, logits_reference, relative_error
from megatron_fp32.output_layer.layer import Fp32OutputLayer, to_fp32_output_layer
from tests.output_layer.layers import HIDDEN, VOCAB, integers, stock_layer
from tests.qwen3_5 import tiny_qwen3_5

pytestmark = pytest.mark.usefixtures("megatron")


class TestConversion:
    def test_everything_but_the_class_is_the_same_object(self) -> None:
        layer, untouched = stock_layer(bias=True), stock_layer(bias=True)
        parameters, attributes = dict(layer.named_parameters()), dict(vars(layer.weight))
        called: list[str] = []
        layer.register_forward_pre_hook(lambda *_: called.append("hook"))
        converted = to_fp32_output_layer(layer)
        assert converted is layer
        assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
        assert vars(layer.weight) == attributes
        assert list(layer.state_dict()) == list(untouched.state_dict())
        layer(integers(2, 1, HIDDEN))
        assert called == ["hook"]

    def test_sharded_state_dict_is_that_of_the_stock_layer(self) -> None:
        metadata = ensure_metadata_has_dp_cp_group({})
        stock = stock_layer(bias=True).sharded_state_dict("output_layer.", (), metadata)
        ours = to_fp32_output_layer(stock_layer(bias=True)).sharded_state_dict("output_layer.", (), metadata)
        assert list(ours) == list(stock)
        for name in ("output_layer.weight", "output_layer.bias"):
            assert ours[name].key == stock[name].key
            assert ours[name].global_shape == stock[name].global_shape
            assert ours[name].dtype == stock[name].dtype

    def test_the_names_that_others_match_on(self) -> None:
        assert Fp32OutputLayer.__name__ == "ColumnParallelLinear"
        assert type(to_fp32_output_layer(stock_layer())).__name__ == "ColumnParallelLinear"
        assert issubclass(Fp32OutputLayer, ColumnParallelLinear)

    def test_pickle_finds_the_class(self) -> None:
        assert pickle.loads(pickle.dumps(Fp32OutputLayer)) is Fp32OutputLayer
        assert pickle.loads(pickle.dumps(ColumnParallelLinear)) is ColumnParallelLinear

    def test_twice_is_once_with_the_new_configuration(self) -> None:
        layer = to_fp32_output_layer(stock_layer())
        layer(integers(2, 1, HIDDEN))
        config = Fp32Config(gated_delta_net=())
        assert to_fp32_output_layer(layer, config) is layer
        assert layer.fp32_config is config
        assert layer.fp32_calls == 1

    def test_the_default_configuration(self) -> None:
        assert to_fp32_output_layer(stock_layer()).fp32_config == Fp32Config()
        assert stock_layer(Fp32OutputLayer).fp32_config == Fp32Config()

    def test_built_and_converted_are_the_same(self) -> None:
        config = Fp32Config(gated_delta_net=())
        built, converted = stock_layer(Fp32OutputLayer, fp32_config=config), to_fp32_output_layer(stock_layer())
        assert built.fp32_config is config
        converted.load_state_dict(built.state_dict())
        hidden = torch.randn(3, 2, HIDDEN).bfloat16()
        assert torch.equal(built(hidden)[0], converted(hidden)[0])
        assert (built.fp32_calls, converted.fp32_calls) == (1, 1)


class TestRefusals:
    def test_a_subclass_with_a_product_of_its_own(self) -> None:
        class Quantized(ColumnParallelLinear):
            def _forward_impl(self, *args: Any, **kwargs: Any) -> Tensor:
                raise NotImplementedError

        layer = stock_layer(Quantized)
        with pytest.raises(TypeError, match=r"Quantized has its own product \(_forward_impl\)"):
            to_fp32_output_layer(layer)
        assert type(layer) is Quantized

    def test_an_instance_whose_product_was_replaced(self) -> None:
        layer = stock_layer()
        layer._forward_impl = lambda **_: None
        with pytest.raises(TypeError, match="has its own product"):
            to_fp32_output_layer(layer)

    def test_27_a_layer_that_modelopt_quantizes(self) -> None:
        layer = stock_layer()
        layer.weight_quantizer = torch.nn.Identity()
        with pytest.raises(TypeError, match="is quantized by ModelOpt"):
            to_fp32_output_layer(layer)

    def test_another_module(self) -> None:
        with pytest.raises(TypeError, match=r"got torch\.nn\.modules\.linear\.Linear"):
            to_fp32_output_layer(torch.nn.Linear(2, 3))  # type: ignore[arg-type]

    def test_experts(self) -> None:
        layer = stock_layer()
        layer.is_expert = True
        with pytest.raises(ValueError, match="expected an output layer, got the layer of an expert"):
            to_fp32_output_layer(layer)

    def test_a_gtp_sharded_weight(self) -> None:
        layer = stock_layer()
        layer.gtp_remat_size = 2
        with pytest.raises(ValueError, match="GTP-sharded weight"):
            to_fp32_output_layer(layer)

    def test_arguments_of_a_newer_megatron(self) -> None:
        layer = to_fp32_output_layer(stock_layer())
        call = {"input": integers(2, 1, HIDDEN), "weight": layer.weight}
        flags = {"allreduce_dgrad": False, "sequence_parallel": False}
        layer._forward_impl(**call, **flags, gtp_remat_size=1, output_dtype=torch.float32)
        for newer in ({"gtp_remat_size": 2}, {"output_dtype": torch.bfloat16}, {"logit_scale": 1.0}):
            with pytest.raises(ValueError, match=f"does not support these arguments .*{next(iter(newer))}"):
                layer._forward_impl(**call, **flags, **newer)
        assert layer.fp32_calls == 1


class TestForward:
    @pytest.mark.parametrize("batch", [1, 2])
    def test_logits_are_fp32_exact_and_writable(self, batch: int) -> None:
        layer = to_fp32_output_layer(stock_layer())
        with torch.no_grad():
            layer.weight.copy_(integers(VOCAB, HIDDEN))
        hidden = integers(5, batch, HIDDEN).requires_grad_()
        logits, bias = layer(hidden)
        assert bias is None
        assert logits.dtype == torch.float32
        assert torch.equal(logits.double(), logits_reference(hidden, layer.weight))
        logits.div_(2).sum().backward()

    def test_every_call_is_counted(self) -> None:
        layer = to_fp32_output_layer(stock_layer())
        assert layer.fp32_calls == 0
        for calls in (1, 2, 3):
            layer(integers(2, 1, HIDDEN))
            assert layer.fp32_calls == calls

    @pytest.mark.parametrize("gather_output", [False, True])
    @pytest.mark.parametrize("runtime_gather_output", [None, False, True])
    def test_gathering_on_one_rank_changes_nothing(
        self, gather_output: bool, runtime_gather_output: bool | None
    ) -> None:
        layer = to_fp32_output_layer(stock_layer(gather_output=gather_output))
        hidden = integers(3, 2, HIDDEN)
        with torch.no_grad():
            layer.weight.copy_(integers(VOCAB, HIDDEN))
        logits, _ = layer(hidden, runtime_gather_output=runtime_gather_output)
        assert torch.equal(logits.double(), logits_reference(hidden, layer.weight))

    def test_logits_gathered_on_one_rank_can_be_changed_in_place(self) -> None:
        """megatron-core's gather returns a view that cannot be, and its cross entropy does just that."""
        layer = to_fp32_output_layer(stock_layer(gather_output=True))
        hidden = torch.randn(3, 1, HIDDEN).bfloat16().requires_grad_()
        logits, _ = layer(hidden, runtime_gather_output=True)
        cotangent = torch.randn(3, 1, VOCAB)
        logits.div_(0.5).backward(cotangent)
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), (cotangent * 2).bfloat16())
        assert torch.equal(hidden.grad, truth.hidden_grad.bfloat16())

    def test_a_tied_weight_is_passed_with_the_call(self) -> None:
        layer = to_fp32_output_layer(stock_layer(skip_weight_param_allocation=True))
        embedding = torch.nn.Parameter(integers(VOCAB, HIDDEN))
        hidden, grad = integers(3, 2, HIDDEN), torch.randint(-8, 9, (3, 2, VOCAB)).float()
        logits, _ = layer(hidden, weight=embedding)
        logits.backward(grad)
        truth = gradients_reference(hidden, embedding, grad)
        assert torch.equal(logits.double(), truth.logits)
        assert torch.equal(embedding.grad, truth.weight_grad.bfloat16())
        with pytest.raises(RuntimeError, match="weight was not supplied"):
            layer(hidden)
        with pytest.raises(RuntimeError, match="supplied weight's shape is"):
            layer(hidden, weight=embedding[1:])

    @pytest.mark.parametrize("skip", [False, True])
    def test_bias_is_added_in_fp32_or_handed_back(self, skip: bool) -> None:
        layer = to_fp32_output_layer(stock_layer(bias=True, skip_bias_add=skip))
        with torch.no_grad():
            layer.bias.copy_(torch.randn(VOCAB))
        hidden = torch.randn(3, 2, HIDDEN).bfloat16()
        logits, bias = layer(hidden)
        truth = logits_reference(hidden, layer.weight, None if skip else layer.bias)
        wide = torch.nn.functional.linear(hidden.float(), layer.weight.float(), None if skip else layer.bias.float())
        assert relative_error(logits, truth) <= 1.5 * relative_error(wide, truth)
        assert bias is (layer.bias if skip else None)
        logits.sum().backward()
        assert (layer.bias.grad is None) == skip

    def test_a_frozen_weight(self) -> None:
        layer = to_fp32_output_layer(stock_layer())
        layer.weight.requires_grad_(False)
        hidden = integers(3, 2, HIDDEN).requires_grad_()
        layer(hidden)[0].sum().backward()
        assert layer.weight.grad is None
        assert hidden.grad is not None


class TestInAModel:
    def build(self, fp32: Fp32Config | None) -> Any:
        model = tiny_qwen3_5()
        config = transformer_config(model, bf16=True, params_dtype=torch.bfloat16, **cpu_overrides())
        return build_model(model, config, fp32, vocab_divisible_by=8).bfloat16()

    def run(self, model: Any) -> tuple[Tensor, Tensor]:
        """Logits [b, s, vocab] and the hidden states [s, b, h] that they came from."""
        seen: list[Tensor] = []
        model.output_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        tokens = torch.arange(16).reshape(2, 8)
        positions = torch.arange(8).expand(2, 8)
        mask = torch.ones(1, 1, 8, 8, dtype=torch.bool).triu(1)
        return model(tokens, positions, mask), seen[0]

    def test_with_the_feature_on_the_models_logits_are_fp32(self) -> None:
        model = self.build(None)
        logits, hidden = self.run(model)
        assert model.output_layer.fp32_calls == 1
        assert logits.dtype == torch.float32
        truth = logits_reference(hidden, model.output_layer.weight).transpose(0, 1)
        stock = torch.matmul(hidden, model.output_layer.weight.t()).transpose(0, 1)
        assert 50 * relative_error(logits, truth) < relative_error(stock, truth)

    def test_with_the_feature_off_class_and_bytes_are_stock(self) -> None:
        model = self.build(Fp32Config(logits=False))
        assert type(model.output_layer) is ColumnParallelLinear
        logits, hidden = self.run(model)
        expected = torch.matmul(hidden, model.output_layer.weight.t()).transpose(0, 1)
        assert logits.dtype == torch.bfloat16
        assert torch.equal(logits.view(torch.int16), expected.contiguous().view(torch.int16))


@pytest.mark.usefixtures("megatron")
def test_a_printed_model_tells_what_is_fp32() -> None:
    layer = to_fp32_output_layer(stock_layer(), Fp32Config(grad_precision="bf16x2", invariant=True))
    text = repr(layer)
    assert text.startswith("ColumnParallelLinear(in_features=")
    assert text.endswith(", TP=1, fp32_logits=True, grad_precision='bf16x2', invariant=True)")
    fused = repr(to_fp32_output_layer(stock_layer(), Fp32Config(fused_loss="saved")))
    assert fused.endswith(", fp32_logits=True, grad_precision='bf16', fused_loss='saved')")
