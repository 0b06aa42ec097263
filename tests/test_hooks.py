"""`apply_fp32` as a hook, and by way of a layer spec, in the model builders of megatron-core."""

from __future__ import annotations

import argparse
import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.transformer.module import Float16Module

from megatron_fp32 import apply
from megatron_fp32.apply import pre_wrap_hook
from megatron_fp32.check import check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.models import specs
from megatron_fp32.models.provider import cpu_overrides, transformer_config
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from megatron_fp32.output_layer.layer import Fp32OutputLayer
from megatron_fp32.testing.training import Batch, Trainer
from tests.qwen3_5 import tiny_qwen3_5
from tests.support import STOCK, stock_model

pytestmark = pytest.mark.usefixtures("megatron", "stock_optimizers")


@pytest.fixture
def stock_optimizers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hooks install the optimizer repairs for the rest of the process; here they are taken back after each test."""
    installed = []

    def install() -> Any:
        installed.append(install_optimizer_repairs())
        return installed[-1]

    monkeypatch.setattr(apply, "install_optimizer_repairs", install)
    yield
    for repairs in reversed(installed):
        repairs.undo()


class TestHooks:
    def test_a_hook_returns_the_chunks_and_logs_what_it_did(self, caplog: pytest.LogCaptureFixture) -> None:
        chunks = [stock_model()]
        with caplog.at_level(logging.INFO, "megatron_fp32.apply"):
            assert pre_wrap_hook(Fp32Config(grad_precision="bf16x2"), weights="initialized")(chunks) is chunks
        assert chunks[0].output_layer.fp32_config.grad_precision == "bf16x2"
        assert "fp32 logits: output_layer" in caplog.text

    def test_the_model_configuration_of_megatron_019(self) -> None:
        gpt = pytest.importorskip("megatron.training.models.gpt", reason="megatron-core < 0.19")
        chunks = self.build(gpt, pre_wrap_hooks=[pre_wrap_hook(weights="initialized")])
        check_fp32(chunks)
        assert isinstance(chunks[0], Float16Module)

    def test_an_unmodified_pretrain_gpt_with_a_spec(self) -> None:
        gpt = pytest.importorskip("megatron.training.models.gpt", reason="megatron-core < 0.19")
        from megatron.core.transformer.spec_utils import import_module

        spec = import_module(("megatron_fp32.models.specs", "pretrain_spec"))
        chunks = self.build(gpt, transformer_layer_spec=spec)
        check_fp32(chunks)
        assert isinstance(chunks[0].module.output_layer, Fp32OutputLayer)

    def test_a_spec_without_gated_delta_net(self) -> None:
        gpt = pytest.importorskip("megatron.training.models.gpt", reason="megatron-core < 0.19")
        fields = {"experimental_attention_variant": None, "linear_attention_freq": None, "normalization": "LayerNorm"}
        fields |= {"layernorm_zero_centered_gamma": False, "qk_layernorm": False, "attention_output_gate": False}
        chunks = self.build(gpt, transformer_layer_spec=specs.pretrain_spec, **fields)
        assert isinstance(chunks[0].module.output_layer, Fp32OutputLayer)

    def test_a_hook_that_keeps_parameters_installs_the_optimizer_repairs(self) -> None:
        hook: Any = pre_wrap_hook(weights="initialized")
        assert hook.optimizer_repairs is None  # nothing is patched before a model comes
        hook([stock_model()])
        assert install_optimizer_repairs().installed == ()
        hook.optimizer_repairs.undo()
        with install_optimizer_repairs() as repairs:
            assert "float16-id-map" in repairs.installed
        elsewhere: Any = pre_wrap_hook(weights="initialized")
        elsewhere([stock_model(experimental_attention_variant=None, linear_attention_freq=None)])
        assert elsewhere.optimizer_repairs is not None, "a pipeline stage without such a layer saves with the others"
        elsewhere.optimizer_repairs.undo()
        nothing: Any = pre_wrap_hook(Fp32Config(gated_delta_net=()), weights="initialized")
        nothing([stock_model()])
        assert nothing.optimizer_repairs is None

    def test_the_spec_alone_satisfies_the_check_of_the_optimizer(self) -> None:
        config = argparse.Namespace(pre_wrap_hooks=[], transformer=stock_model().config)
        specs.pretrain_spec(config)
        (hook,) = config.pre_wrap_hooks
        chunks = hook([stock_model()])
        trainer = Trainer(chunks[0])
        trainer.step([Batch.random(chunks[0].vocab_size, seed=0)])
        check_fp32([trainer.model], optimizer=trainer.optimizer)
        hook.optimizer_repairs.undo()

    def test_the_spec_adds_its_hook_once(self) -> None:
        pytest.importorskip("megatron.training.models.gpt", reason="megatron-core < 0.19")
        config = argparse.Namespace(pre_wrap_hooks=["other"], transformer=stock_model().config)
        for _ in range(2):
            specs.pretrain_spec(config)
        assert len(config.pre_wrap_hooks) == 2
        assert config.pre_wrap_hooks[1] == "other"

    def test_a_release_that_takes_no_function(self) -> None:
        with pytest.raises(TypeError, match=r"with pre_wrap_hooks \(megatron-core >= 0.19\), got Namespace"):
            specs.pretrain_spec(argparse.Namespace())

    def build(self, gpt: Any, *, pre_wrap_hooks: Any = (), transformer_layer_spec: Any = None, **fields: Any) -> Any:
        from megatron.core.process_groups_config import ProcessGroupCollection

        overrides = {"bf16": True, "params_dtype": torch.bfloat16, **cpu_overrides(), **fields}
        config = gpt.GPTModelConfig(
            transformer=transformer_config(tiny_qwen3_5(), **overrides),
            transformer_layer_spec=transformer_layer_spec
            or (lambda c, vp_stage: specs.decoder_block_spec(c.transformer, STOCK, vp_stage=vp_stage)),
            vocab_size=120,
            seq_length=64,
            position_embedding_type="rope",
            pre_wrap_hooks=list(pre_wrap_hooks),
        )
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return gpt.GPTModelBuilder(config).build_distributed_models(
            groups, wrap_with_ddp=False, data_parallel_random_init=False
        )


def test_a_copied_configuration_has_the_same_hook() -> None:
    """Megatron's training copies its model configurations; the handle of the repairs must stay reachable."""
    hook = apply.pre_wrap_hook(weights="initialized")
    assert copy.deepcopy({"hooks": [hook]})["hooks"][0] is hook
    assert copy.copy(hook) is hook
    assert hook.__name__ == "megatron_fp32_pre_wrap_hook"
