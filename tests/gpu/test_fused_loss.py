"""The loss of a GPTModel without logits, on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_fp32.config import Fp32Config
from megatron_fp32.models.provider import build_model, transformer_config
from megatron_fp32.output_layer.requests import LogprobsRequest, TopLogprobsRequest
from megatron_fp32.results import returning
from megatron_fp32.testing.training import Batch, Trainer
from tests.qwen3_5 import tiny_qwen3_5

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_megatron")]


def built(fused: Any, **options: Any) -> Any:
    """A model of two layers."""
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(0)
    # Attention alone: what the gated delta net needs on a GPU is another test's business.
    shapes = tiny_qwen3_5(vocab_size=1024, layer_types=("full_attention", "full_attention"))
    config = transformer_config(
        shapes, bf16=True, params_dtype=torch.bfloat16, transformer_impl="local", persist_layer_norm=False
    )
    return build_model(shapes, config, Fp32Config(fused_loss=fused, **options)).cuda()


def training(fused: Any, **options: Any) -> tuple[list[float], torch.Tensor]:
    """Losses of four steps, and the output layer's weight after them."""
    model = built(fused, **options)
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


@pytest.mark.parametrize("fused", ["off", "recompute"])
def test_results_in_place_of_logits(fused: str) -> None:
    model = built(fused)
    batch = Batch.random(1024, length=128).to("cuda")
    places = torch.arange(128, device="cuda").expand(2, 128)
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool, device="cuda").triu(1)
    exact = model(batch.tokens, places, mask).detach().double().log_softmax(-1)
    with returning(model, LogprobsRequest(top_k=4)):
        of_labels = model(batch.tokens, places, mask, labels=batch.labels)
    with returning(model, TopLogprobsRequest(k=4)):
        of_top = model(batch.tokens, places, mask)
    label = exact.gather(2, batch.labels[..., None])[..., 0]
    assert (of_labels.logprobs.double() - label).abs().max() < 1e-4
    assert (of_labels.entropy.double() + (exact.exp() * exact).sum(-1)).abs().max() < 1e-4
    for top in (of_labels.top_logprobs, of_top.logprobs):
        assert (top.double() - exact.topk(4).values).abs().max() < 1e-4
    (of_labels.logprobs.sum() + of_top.rest.sum()).backward()
    assert model.output_layer.weight.grad.isfinite().all()
