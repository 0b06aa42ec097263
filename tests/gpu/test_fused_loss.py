"""The loss of a GPTModel without logits, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_fp32.config import Fp32Config
from megatron_fp32.models.provider import build_model, transformer_config
from megatron_fp32.testing.training import Batch, Trainer
from tests.qwen3_5 import tiny_qwen3_5

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_megatron")]


def training(fused: Any, **options: Any) -> tuple[list[float], torch.Tensor]:
    """Losses of four steps, and the output layer's weight after them."""
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    # Attention alone: what the gated delta net needs on a GPU is another test's business.
    shapes = tiny_qwen3_5(vocab_size=1024, layer_types=("full_attention", "full_attention"))
    config = transformer_config(
        shapes, bf16=True, params_dtype=torch.bfloat16, transformer_impl="local", persist_layer_norm=False
    )
    model = build_model(shapes, config, Fp32Config(fused_loss=fused, **options)).cuda()
    trainer = Trainer(model)
    batch = Batch.random(1024, length=128).to("cuda")
    losses = [trainer.step([batch]) for _ in range(4)]
    return losses, model.output_layer.weight.detach().float()


@pytest.mark.parametrize("options", [{}, {"grad_precision": "bf16x2"}, {"invariant": True}])
@pytest.mark.parametrize("fused", ["recompute", "saved"])
def test_training_with_it_is_training_without(fused: str, options: Any) -> None:
    expected, expected_weight = training("off", **options)
    losses, weight = training(fused, **options)
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    assert losses == pytest.approx(expected, rel=1e-3)
    assert losses[3] < losses[0]
    assert (weight - expected_weight).norm() < 0.01 * expected_weight.norm()
