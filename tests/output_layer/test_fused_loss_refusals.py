"""What the loss without logits cannot do is refused, and nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear

from megatron_fp32.apply import apply_fp32
from megatron_fp32.check import check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.output_layer.layer import to_fp32_output_layer
from tests.output_layer.layers import FUSED, SoftCapped, gpt, scaled_layer


@pytest.mark.usefixtures("megatron")
class TestRefusals:
    def test_a_layer_with_a_bias(self) -> None:
        with pytest.raises(ValueError, match="an output layer with a bias"):
            to_fp32_output_layer(scaled_layer(bias=True, skip_bias_add=False), FUSED[0])

    def test_a_subclass_that_changes_logits(self) -> None:
        layer = scaled_layer()
        layer.__class__ = SoftCapped
        with pytest.raises(ValueError, match=r"SoftCapped.forward changes the logits; its change would be lost"):
            to_fp32_output_layer(layer, FUSED[0])

    @pytest.mark.parametrize("field", ["cross_entropy_loss_fusion", "defer_embedding_wgrad_compute"])
    def test_what_else_computes_the_loss_or_its_gradient(self, field: str) -> None:
        layer = scaled_layer()
        setattr(layer.config, field, True)
        if field == "defer_embedding_wgrad_compute":
            layer.embedding_activation_buffer, layer.grad_output_buffer = [], []
        with pytest.raises(ValueError, match=f"turn {field} off"):
            to_fp32_output_layer(layer, FUSED[0])

    def test_a_model_that_would_not_know_deferred_logits(self) -> None:
        outer = torch.nn.Module()
        outer.output_layer = scaled_layer()
        with pytest.raises(ValueError, match="belongs to a Module, not a LanguageModule"):
            apply_fp32(outer, FUSED[0], weights="initialized")
        assert type(outer.output_layer) is ColumnParallelLinear

    def test_a_model_with_a_loss_of_its_own(self) -> None:
        model = gpt()
        model.__class__ = type("WithZLoss", (GPTModel,), {"compute_language_model_loss": lambda *_: None})
        with pytest.raises(ValueError, match="this WithZLoss has its own"):
            apply_fp32(model, FUSED[0], weights="initialized")
        model = gpt()
        model.compute_language_model_loss = lambda *_: None
        with pytest.raises(ValueError, match="this GPTModel has its own"):
            apply_fp32(model, FUSED[0], weights="initialized")

    def test_a_loss_that_someone_replaced_is_found(self) -> None:
        model = gpt()
        apply_fp32(model, FUSED[0], weights="initialized")
        model.compute_language_model_loss = LanguageModule.compute_language_model_loss.__get__(model)
        with pytest.raises(RuntimeError, match="compute_language_model_loss was replaced"):
            check_fp32(model, FUSED[0])

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"fused_loss": "yes"}, "fused_loss must be one of"),
            ({"fused_loss": "saved", "logits": False}, "fused_loss needs logits=True"),
            ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ],
    )
    def test_configurations(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Fp32Config(**fields)
