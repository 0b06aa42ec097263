"""Where dW goes: the edge cases of `main_grad`, tied, frozen and detached weights, on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.ops.logits.reference import gradients_reference, logits_reference, relative_error
from megatron_fp32.output_layer.layer import to_fp32_output_layer
from tests.output_layer.layers import HIDDEN, VOCAB, head, integers, micro_batch, own_main_grad, stock_layer

pytestmark = pytest.mark.usefixtures("megatron")


class TestWeightGradient:
    """Where dW goes."""

    def test_04_it_is_fp32_only_through_main_grad_and_autograd_gets_a_dummy(self) -> None:
        layer = head()
        hidden, grad = micro_batch()
        layer(hidden)[0].backward(grad / 3)
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), (grad / 3).bfloat16()).weight_grad
        assert relative_error(layer.weight.main_grad, truth) < 1e-6
        assert not torch.equal(layer.weight.main_grad, layer.weight.main_grad.bfloat16().float())
        assert layer.weight.grad_added_to_main_grad
        assert layer.weight.grad.shape == layer.weight.shape

    def test_04_main_grad_in_bf16_works_too(self) -> None:
        layer = head()
        layer.weight.main_grad = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16)
        hidden, grad = micro_batch()
        layer(hidden)[0].backward(grad)
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), grad).weight_grad
        assert torch.equal(layer.weight.main_grad, truth.bfloat16())

    @pytest.mark.parametrize("main_grad", ["absent", "none", "megatron-fsdp", "functional_call"])
    def test_05_without_main_grad_a_real_gradient_is_returned(self, main_grad: str) -> None:
        layer = head()
        weight, buffer = layer.weight, layer.weight.main_grad
        hidden, grad = micro_batch()
        if main_grad == "functional_call":
            weight = layer.weight.detach().clone().requires_grad_()
            logits, _ = torch.func.functional_call(layer, {"weight": weight}, (hidden,))
        else:
            if main_grad == "absent":
                del layer.weight.main_grad
            elif main_grad == "none":
                layer.weight.main_grad = None
            else:
                # Its hooks know whether to overwrite the buffer or to add; we do not.
                layer.weight.__fsdp_param__ = True
                layer.weight.get_main_grad = lambda: pytest.fail("the buffer was fetched")
            logits, _ = layer(hidden)
        logits.backward(grad)
        truth = gradients_reference(hidden.detach(), weight.detach(), grad).weight_grad
        assert torch.equal(weight.grad, truth.bfloat16())
        assert not buffer.any()
        assert not layer.weight.grad_added_to_main_grad

    def test_05_main_grad_may_be_pointed_elsewhere_between_forward_and_backward(self) -> None:
        layer = head()
        old = layer.weight.main_grad
        hidden, grad = micro_batch()
        logits, _ = layer(hidden)
        layer.weight.main_grad = torch.zeros(VOCAB, HIDDEN)
        logits.backward(grad)
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), grad).weight_grad
        assert torch.equal(layer.weight.main_grad.double(), truth)
        assert not old.any()

    @pytest.mark.parametrize("fusion", [False, True])
    def test_06_gradient_accumulation_fusion_needs_no_apex(self, fusion: bool, monkeypatch: Any) -> None:
        from megatron.core.tensor_parallel import layers

        # The constructor asks for Apex' kernel; ours never calls it.
        monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
        stock = stock_layer()
        stock.gradient_accumulation_fusion = stock.config.gradient_accumulation_fusion = fusion
        layer: Any = to_fp32_output_layer(stock)
        own_main_grad(layer.weight)
        truth = torch.zeros(VOCAB, HIDDEN, dtype=torch.float64)
        for _ in range(3):
            hidden, grad = micro_batch()
            layer(hidden)[0].backward(grad)
            truth += gradients_reference(hidden.detach(), layer.weight.detach(), grad).weight_grad
        assert torch.equal(layer.weight.main_grad.double(), truth)

    def test_11_a_tied_weight_comes_with_the_call_and_need_not_be_the_same_twice(self) -> None:
        layer = head(skip_weight_param_allocation=True)
        for _ in range(2):
            tied = torch.nn.Parameter(integers(VOCAB, HIDDEN))
            own_main_grad(tied)
            tied.zero_out_wgrad = True  # the embedding's gradient comes through autograd
            hidden, grad = micro_batch()
            layer(hidden, weight=tied)[0].backward(grad)
            truth = gradients_reference(hidden.detach(), tied.detach(), grad).weight_grad
            assert torch.equal(tied.main_grad.double(), truth)
            assert not tied.grad.any()

    def test_11_an_embeddings_own_gradient_is_not_lost(self) -> None:
        """Without pipeline parallelism megatron-core marks tied weights; the embedding of an MTP stage it does not."""
        layer = head(skip_weight_param_allocation=True)
        tied: Any = torch.nn.Parameter(integers(VOCAB, HIDDEN).detach())
        own_main_grad(tied)
        tokens, grad = torch.randint(VOCAB, (6, 2)), torch.randint(-2, 3, (6, 2, VOCAB)).float()
        embedded = torch.nn.functional.embedding(tokens, tied)
        layer(embedded, weight=tied)[0].backward(grad)
        # What DistributedDataParallel's hook does.
        if not tied.grad_added_to_main_grad or getattr(tied, "zero_out_wgrad", False):
            tied.main_grad.add_(tied.grad)
        truth = gradients_reference(embedded.detach(), tied.detach(), grad)
        both = truth.weight_grad.clone()
        both.index_add_(0, tokens.flatten(), truth.hidden_grad.bfloat16().double().flatten(0, 1))
        assert relative_error(tied.main_grad, both) < 3e-3
        assert relative_error(truth.weight_grad, both) > 0.1

    def test_11_a_frozen_weight_keeps_no_hidden_states(self) -> None:
        layer = head()
        layer.weight.requires_grad_(False)
        saved: list[Tensor] = []
        hidden, grad = micro_batch()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            logits, _ = layer(hidden)
        assert [t.shape for t in saved] == [layer.weight.shape]
        logits.backward(grad)
        truth = gradients_reference(hidden.detach(), layer.weight, grad)
        assert torch.equal(hidden.grad, truth.hidden_grad.bfloat16())
        assert not layer.weight.main_grad.any()

    def test_11_a_detached_weight_of_an_mtp_head_leaves_main_grad_alone(self) -> None:
        layer = head()
        hidden, grad = micro_batch()
        layer(hidden, weight=layer.weight.detach())[0].backward(grad)
        assert not layer.weight.main_grad.any()
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), grad)
        assert torch.equal(hidden.grad, truth.hidden_grad.bfloat16())

    def test_12_mtp_calls_the_layer_again_before_any_backward_pass(self) -> None:
        layer = head()
        batches = [micro_batch() for _ in range(3)]
        outputs = [layer(hidden)[0] for hidden, _ in batches]
        torch.autograd.backward(outputs, [grad for _, grad in batches])
        truth = sum(gradients_reference(h.detach(), layer.weight.detach(), g).weight_grad for h, g in batches)
        assert torch.equal(layer.weight.main_grad.double(), truth)
        assert layer.fp32_calls == 3

    def test_29_a_refit_writes_weights_in_place_and_the_next_call_sees_them(self) -> None:
        layer = head()
        hidden, _ = micro_batch()
        layer(hidden)
        layer.weight.data.copy_(integers(VOCAB, HIDDEN))
        logits, _ = layer(hidden)
        assert torch.equal(logits.double(), logits_reference(hidden, layer.weight))
        assert {name for name, _ in layer.named_buffers()} == set()
