"""`apply_fp32` on models that others built. What `check_fp32` says of them afterwards is in test_check.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.T5 import T5Model
from megatron.core.models.T5.t5_spec import (
    get_t5_decoder_with_local_block_spec,
    get_t5_encoder_with_local_block_spec,
)
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from megatron_fp32.apply import apply_fp32
from megatron_fp32.check import check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.gated_delta_net.layer import Fp32GatedDeltaNet
from megatron_fp32.models import specs
from megatron_fp32.models.provider import cpu_overrides, transformer_config
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from megatron_fp32.output_layer.layer import Fp32OutputLayer
from megatron_fp32.testing.training import Batch, Trainer
from tests.qwen3_5 import tiny_qwen3_5
from tests.support import STOCK, stock_model

pytestmark = pytest.mark.usefixtures("megatron")

A_LOG = "decoder.layers.0.self_attention.A_log"
OUT_NORM = "decoder.layers.0.self_attention.out_norm.weight"


class TestModels:
    """Where layers are found."""

    def test_a_gpt_model(self) -> None:
        model = stock_model()
        keys, parameters = list(model.state_dict()), dict(model.named_parameters())
        report = apply_fp32(model, weights="initialized")
        assert type(model.output_layer) is Fp32OutputLayer
        assert type(model.decoder.layers[0].self_attention) is Fp32GatedDeltaNet
        assert list(model.state_dict()) == keys
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert report.output_layers == ("output_layer",)
        assert [(p.name, p.previous_dtype) for p in report.parameters] == [
            (A_LOG, torch.bfloat16),
            (OUT_NORM, torch.bfloat16),
        ]
        assert report.skipped == ()
        assert {name for name, p in model.named_parameters() if p.dtype == torch.float32} == {A_LOG, OUT_NORM}

    def test_it_survives_wrapping_and_trains(self) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        with install_optimizer_repairs():
            trainer = Trainer(model)
            batch = Batch.random(120, batch=2, length=16)
            first = trainer.step([batch])
            assert trainer.step([batch]) < first
            check_fp32(trainer.model, optimizer=trainer.optimizer, after_forward=True)
        assert model.get_parameter(A_LOG).dtype == torch.float32

    @pytest.mark.parametrize("precision", ["bf16", "bf16x2"])
    def test_a_float16_model_trains_under_its_loss_scale(self, precision: Any) -> None:
        model = stock_model(bf16=False, fp16=True, params_dtype=torch.float16)
        apply_fp32(model, Fp32Config(grad_precision=precision), weights="initialized")
        with install_optimizer_repairs():
            trainer = Trainer(model)
            batch = Batch.random(120, batch=2, length=16)
            losses = [trainer.step([batch]) for _ in range(30)]
            check_fp32(trainer.model, Fp32Config(grad_precision=precision), optimizer=trainer.optimizer)
        # The first steps overflow and are skipped, until the loss scale has come down.
        assert losses[0] == losses[1]
        assert losses[-1] < losses[0]

    def test_doing_it_again_changes_nothing(self) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        report = apply_fp32(model, Fp32Config(grad_precision="bf16x2"), weights="initialized")
        assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())
        assert not any(p.redrawn for p in report.parameters)
        assert {p.previous_dtype for p in report.parameters} == {torch.float32}
        assert model.output_layer.fp32_config.grad_precision == "bf16x2"

    def test_30_chunks_of_a_virtual_pipeline_have_one_head_among_them(self) -> None:
        first = stock_model(stage={"post_process": False})
        last = stock_model(stage={"pre_process": False})
        report = apply_fp32([first, last], weights="initialized")
        assert report.output_layers == ("chunk 1: output_layer",)
        assert {p.name for p in report.parameters} == {f"chunk {i}: {n}" for i in (0, 1) for n in (A_LOG, OUT_NORM)}
        check_fp32([first, last])

    def test_a_stage_without_a_head_needs_none(self) -> None:
        report = apply_fp32([stock_model(stage={"post_process": False})], weights="initialized")
        assert report.output_layers == ()

    def test_30_a_language_model_inside_a_vision_language_model(self) -> None:
        class VisionLanguage(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.vision = nn.Linear(4, 4)
                self.thinker = nn.Module()
                self.thinker.language_model = stock_model()

        model = VisionLanguage()
        report = apply_fp32(model, weights="initialized")
        assert report.output_layers == ("thinker.language_model.output_layer",)
        assert report.parameters[0].name == f"thinker.language_model.{A_LOG}"

    @pytest.mark.parametrize("pattern", ["G*", "*G", "G-*-", "G-G-*-G"])
    def test_a_hybrid_model_whose_layers_follow_its_own_pattern(self, pattern: str) -> None:
        hybrid = pytest.importorskip("megatron.core.models.hybrid.hybrid_model", reason="megatron-core < 0.18")
        from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
        from megatron.core.transformer.spec_utils import ModuleSpec

        config = transformer_config(tiny_qwen3_5(), bf16=True, params_dtype=torch.bfloat16, **cpu_overrides())
        layers = specs.decoder_block_spec(config, STOCK).layer_specs
        mlp = ModuleSpec(module=TransformerLayer, submodules=TransformerLayerSubmodules())
        stack = HybridStackSubmodules(gdn_layer=layers[0], attention_layer=layers[1], mlp_layer=mlp)
        model = hybrid.HybridModel(
            config=config,
            hybrid_stack_spec=ModuleSpec(module=HybridStack, params={"post_layer_norm": False}, submodules=stack),
            vocab_size=120,
            max_sequence_length=64,
            hybrid_layer_pattern=pattern,
        )
        report = apply_fp32(model, weights="initialized")
        assert report.output_layers == ("output_layer",)
        assert len(report.parameters) == 2 * pattern.count("G")
        assert type(model.output_layer) is Fp32OutputLayer

    def test_bert_and_t5(self) -> None:
        def config() -> TransformerConfig:
            sizes = {"num_layers": 1, "hidden_size": 64, "num_attention_heads": 4}
            return TransformerConfig(**sizes, bf16=True, params_dtype=torch.bfloat16, **cpu_overrides())

        bert = BertModel(config(), 0, bert_layer_local_spec, vocab_size=96, max_sequence_length=16)
        assert apply_fp32(bert, weights="initialized").output_layers == ("output_layer",)
        assert bert.output_layer.bias is not None
        t5 = T5Model(
            config(),
            config(),
            get_t5_encoder_with_local_block_spec(1),
            get_t5_decoder_with_local_block_spec(1),
            vocab_size=96,
            max_sequence_length=16,
        )
        assert apply_fp32(t5, weights="initialized").output_layers == ("lm_head.output_layer",)

    def test_an_mtp_stage_of_a_hybrid_model_has_a_head_too(self) -> None:
        donor = stock_model()
        stage = LanguageModule(config=donor.config)
        stage.post_process, stage.mtp_process, stage.output_layer = False, True, donor.output_layer
        assert apply_fp32(stage, weights="initialized").output_layers == ("output_layer",)

    @pytest.mark.parametrize("attribute", ["to_wrap", "base_layer"])
    def test_27_of_a_lora_wrapper_the_layer_within(self, attribute: str) -> None:
        class LoRALinear(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                setattr(self, attribute, inner)

            def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
                output, bias = getattr(self, attribute)(x, **kwargs)
                return output + torch.ones((), dtype=torch.bfloat16), bias

        model = stock_model()
        model.output_layer = LoRALinear(model.output_layer)
        report = apply_fp32(model, weights="initialized")
        assert report.output_layers == (f"output_layer.{attribute}",)
        logits, _ = model.output_layer(torch.randn(3, 1, 64).bfloat16())
        assert logits.dtype == torch.float32
        assert isinstance(model.output_layer, LoRALinear)


class TestLeft:
    """What is not changed, and why."""

    def test_a_value_head(self) -> None:
        class LinearForLastLayer(nn.Linear):
            pass

        model = stock_model()
        model.output_layer = LinearForLastLayer(64, 1)
        report = apply_fp32(model, weights="initialized")
        assert report.output_layers == ()
        ((name, reason),) = report.skipped
        assert name == "output_layer"
        assert "a value head" in reason
        assert "LinearForLastLayer" in str(report)
        check_fp32(model)

    def test_a_linear_layer_as_wide_as_the_vocabulary_is_no_value_head(self) -> None:
        model = stock_model()
        model.output_layer = nn.Linear(64, 120)
        with pytest.raises(TypeError, match=r"output_layer is a torch.nn.modules.linear.Linear, which is not a Column"):
            apply_fp32(model, weights="initialized")

    def test_a_rank_with_an_encoder_alone(self) -> None:
        class VisionLanguage(nn.Module):
            add_decoder, language_model = False, None

        assert apply_fp32([VisionLanguage()], weights="initialized").skipped == (
            ("VisionLanguage", "an encoder without a decoder"),
        )
        check_fp32([VisionLanguage()])

    def test_a_classifier_of_another_kind(self) -> None:
        class TELinear(nn.Module):
            out_features = 5

        model = stock_model()
        model.output_layer = TELinear()
        assert "a head of 5 outputs for a vocabulary of 120" in apply_fp32(model, weights="initialized").skipped[0][1]

    def test_an_mxfp8_head_is_refused_and_nothing_is_changed(self) -> None:
        class TELMHeadColumnParallelLinear(nn.Module):
            out_features = 120

        model = stock_model()
        model.output_layer = TELMHeadColumnParallelLinear()
        with pytest.raises(TypeError, match=r"output_layer is a .*TELMHead.* computes its product in MXFP8"):
            apply_fp32(model, weights="initialized")
        assert type(model.decoder.layers[0].self_attention) is GatedDeltaNet

    def test_a_head_that_is_refused_leaves_the_other_chunks_unchanged(self) -> None:
        good, bad = stock_model(), stock_model()
        bad.output_layer.gtp_remat_size = 4
        with pytest.raises(ValueError, match="GTP-sharded"):
            apply_fp32([good, bad], weights="initialized")
        assert type(good.output_layer) is ColumnParallelLinear

    def test_a_log_of_other_layers_is_reported(self) -> None:
        model = stock_model()
        model.mixer = nn.Module()
        model.mixer.A_log = nn.Parameter(torch.zeros(4))
        assert apply_fp32(model, weights="initialized").skipped == (
            ("mixer.A_log", "Module is not megatron-core's GatedDeltaNet; see keep_in_fp32"),
        )

    def test_logits_or_parameters_alone(self) -> None:
        model = stock_model()
        assert apply_fp32(model, Fp32Config(logits=False), weights="initialized").output_layers == ()
        assert type(model.output_layer) is ColumnParallelLinear
        model = stock_model()
        assert apply_fp32(model, Fp32Config(gated_delta_net=()), weights="initialized").parameters == ()
        assert type(model.decoder.layers[0].self_attention) is GatedDeltaNet


class TestNothingMatched:
    def test_a_last_stage_without_a_head(self) -> None:
        model = stock_model()
        model.head, model.output_layer = model.output_layer, None
        with pytest.raises(ValueError, match="no module called output_layer in GPTModel, a last pipeline stage"):
            apply_fp32(model, weights="initialized")

    def test_no_language_model_at_all(self) -> None:
        with pytest.raises(ValueError, match="no language model that says"):
            apply_fp32(nn.Sequential(nn.Linear(2, 2)), weights="initialized")

    def test_a_layer_that_should_be_a_gated_delta_net(self) -> None:
        model = stock_model()
        model.decoder.layers[0].self_attention = nn.Identity()
        with pytest.raises(ValueError, match=r"decoder\.layers\.0 must hold .*GatedDeltaNet.* is a Identity"):
            apply_fp32(model, weights="initialized")

    def test_a_subclass_of_the_layer(self) -> None:
        class Other(GatedDeltaNet):
            pass

        model = stock_model()
        model.decoder.layers[0].self_attention.__class__ = Other
        with pytest.raises(TypeError, match=r"got .*Other: a subclass may use its parameters in its own way"):
            apply_fp32(model, weights="initialized")
        assert type(model.output_layer) is ColumnParallelLinear

    def test_a_parameter_that_is_not_there(self) -> None:
        model = stock_model()
        with pytest.raises(ValueError, match="has no parameter 'D'; it has: dt_bias, A_log, "):
            apply_fp32(model, Fp32Config(gated_delta_net=("A_log", "D")), weights="initialized")
        assert type(model.output_layer) is ColumnParallelLinear
        assert type(model.decoder.layers[0].self_attention) is GatedDeltaNet

    def test_a_parameter_that_ddp_owns_leaves_the_head_unchanged(self) -> None:
        model = stock_model()
        model.get_parameter(A_LOG).main_grad = torch.zeros(4)
        with pytest.raises(ValueError, match="already belongs to DistributedDataParallel"):
            apply_fp32(model, weights="initialized")
        assert type(model.output_layer) is ColumnParallelLinear

    def test_a_wrapped_model(self) -> None:
        model = stock_model()
        with pytest.raises(ValueError, match="wrapped in Float16Module already: apply_fp32 must come before"):
            apply_fp32([Float16Module(model.config, model)], weights="initialized")

    @pytest.mark.parametrize("model", [[], [3], "model"])
    def test_no_model(self, model: Any) -> None:
        with pytest.raises(TypeError, match="expected a module or a non-empty list of modules"):
            apply_fp32(model, weights="initialized")
