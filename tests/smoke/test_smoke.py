"""Build, wrap, train, save and load, on whichever megatron-core is on the path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import megatron.core
import pytest
import torch
from torch import nn

from megatron_fp32.apply import apply_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.kept_parameters.keep_in_fp32 import kept_parameters
from megatron_fp32.ops.logprobs import Logprobs, SelectedLogprobs
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from megatron_fp32.output_layer.requests import LogprobsRequest, TopLogprobsRequest
from megatron_fp32.results import returning
from megatron_fp32.testing.training import TrainerConfig
from tests.distributed import jobs
from tests.output_layer.layers import fill, gpt, hybrid, inputs


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("sharding", ["dp_reshardable", "fully_reshardable"])
def test_build_wrap_train_save_load(tmp_path: Path, sharding: str) -> None:
    print("megatron-core", megatron.core.__version__)
    with install_optimizer_repairs():
        config = TrainerConfig(sharding=sharding)
        trained = jobs.trainer(config, tensor=1)
        assert {str(p.dtype) for _, p in kept_parameters(trained.model)} == {"torch.float32"}
        losses = [trained.step(jobs.batches()) for _ in range(4)]
        assert losses[-1] < losses[0]
        assert trained.model.output_layer.fp32_calls == 8
        trained.save(tmp_path)
        loaded = jobs.trainer(config, tensor=1)
        with torch.no_grad():
            for parameter in loaded.model.parameters():
                parameter.fill_(7.0)
        loaded.load(tmp_path)
        assert jobs.state_of(loaded) == jobs.state_of(trained)
        assert loaded.step(jobs.batches()) == trained.step(jobs.batches())


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("make", [gpt, hybrid])
def test_results_in_place_of_logits(make: Callable[[], nn.Module]) -> None:
    print("megatron-core", megatron.core.__version__)
    model = make()
    fill(model)
    apply_fp32(model, Fp32Config(gated_delta_net=()), weights="initialized")
    losses = model(**inputs())
    with returning(model, LogprobsRequest(top_k=2)):
        results = Logprobs(*model(**inputs()))
    with returning(model, TopLogprobsRequest(k=2)):
        top = SelectedLogprobs(*model(**inputs(labels=False)))
    torch.testing.assert_close(results.logprobs, -losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(top.tokens, results.top_tokens)
    assert torch.equal(model(**inputs()), losses)
