"""`defer_embedding_wgrad_compute`: dW is computed after the pipeline has drained, by Apex' kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.config import Fp32Config
from megatron_fp32.ops.logits.reference import gradients_reference
from megatron_fp32.output_layer.layer import to_fp32_output_layer
from tests.output_layer.layers import HIDDEN, VOCAB, integers, micro_batch, own_main_grad, stock_layer

pytestmark = pytest.mark.usefixtures("megatron")


def deferring(limit: int = 0) -> Any:
    """A stock layer in the state that GPTModel builds with `defer_embedding_wgrad_compute`."""
    layer = stock_layer(embedding_activation_buffer=[], grad_output_buffer=[])
    layer.config.defer_embedding_wgrad_compute = True
    layer.config.wgrad_deferral_limit = limit
    return layer


class TestRefusals:
    def test_12_a_deferred_weight_gradient_with_split_gradients(self) -> None:
        with pytest.raises(ValueError, match="needs grad_precision='bf16', got 'bf16x2'"):
            to_fp32_output_layer(deferring(), Fp32Config(grad_precision="bf16x2"))

    def test_12_deferring_without_buffers(self) -> None:
        layer = deferring()
        layer.embedding_activation_buffer = None
        with pytest.raises(ValueError, match="did not give its output layer buffers"):
            to_fp32_output_layer(layer)

    def test_12_deferring_with_mtp_would_pair_the_wrong_tensors(self) -> None:
        layer = deferring()
        layer.config.mtp_num_layers = 1
        with pytest.raises(ValueError, match="differ with multi-token prediction"):
            to_fp32_output_layer(layer)

    @pytest.mark.parametrize("frozen", [False, True])
    def test_12_deferring_needs_a_trainable_weight_with_main_grad(self, frozen: bool) -> None:
        layer = to_fp32_output_layer(deferring())
        layer.weight.requires_grad_(not frozen)
        with pytest.raises(ValueError, match="needs a trainable weight with main_grad"):
            layer(integers(2, 1, HIDDEN))
        assert layer.fp32_calls == 0


class TestDeferredWeightGradient:
    """`drain_embedding_wgrad_compute` with a stand-in for Apex' kernel."""

    @pytest.fixture
    def apex(self, monkeypatch: Any) -> None:
        def accumulate(hidden: Tensor, grad: Tensor, main_grad: Tensor) -> None:
            assert hidden.dtype == grad.dtype == torch.bfloat16
            main_grad += grad.float().t() @ hidden.float()

        stub = SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
        monkeypatch.setitem(__import__("sys").modules, "fused_weight_gradient_mlp_cuda", stub)

    @pytest.mark.parametrize("limit", [0, 2])
    @pytest.mark.usefixtures("apex")
    def test_12_it_is_the_gradient_of_an_immediate_pass(self, limit: int) -> None:
        from megatron.core.utils import drain_embedding_wgrad_compute

        layer: Any = to_fp32_output_layer(deferring(limit))
        layer.config.gradient_accumulation_fusion = True
        own_main_grad(layer.weight)
        truth = torch.zeros(VOCAB, HIDDEN, dtype=torch.float64)
        for count in range(1, 5):
            hidden, grad = micro_batch()
            layer(hidden)[0].backward(grad)
            part = gradients_reference(hidden.detach(), layer.weight.detach(), grad)
            truth += part.weight_grad
            assert torch.equal(hidden.grad, part.hidden_grad.bfloat16())
            assert len(layer.grad_output_buffer) == (min(count, limit) if limit else count)
            assert layer.weight.grad_added_to_main_grad
        assert layer.weight.main_grad.any() == bool(limit)
        drain_embedding_wgrad_compute(
            layer.config, layer.embedding_activation_buffer, layer.grad_output_buffer, layer.weight, layer.tp_group
        )
        assert torch.equal(layer.weight.main_grad.double(), truth)
