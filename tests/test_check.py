"""`check_fp32` names every fault."""

from __future__ import annotations

import argparse
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.transformer.module import Float16Module
from torch import nn

from megatron_fp32.apply import apply_fp32
from megatron_fp32.check import check_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.kept_parameters.keep_in_fp32 import keep_in_fp32
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from megatron_fp32.testing.training import Trainer, TrainerConfig
from tests.support import stock_model

pytestmark = pytest.mark.usefixtures("megatron")

A_LOG = "decoder.layers.0.self_attention.A_log"
FINAL_NORM = "decoder.final_layernorm.weight"
OUT_NORM = "decoder.layers.0.self_attention.out_norm.weight"


class TestCheck:
    """Each fault is named."""

    def trainer(self, **config: Any) -> Trainer:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        return Trainer(model, TrainerConfig(**config))

    def complaint(self, model: Any, *args: Any, **kwargs: Any) -> str:
        with pytest.raises(RuntimeError, match="not in fp32 as configured:") as error:
            check_fp32(model, *args, **kwargs)
        return str(error.value)

    def test_a_stock_model(self) -> None:
        text = self.complaint(stock_model())
        assert "output_layer is a ColumnParallelLinear, not an Fp32OutputLayer" in text
        assert "layers.0.self_attention is a GatedDeltaNet, not an Fp32GatedDeltaNet" in text

    def test_a_parameter_that_was_rounded(self) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        model.get_parameter(A_LOG).data = model.get_parameter(A_LOG).data.bfloat16()
        assert f"{A_LOG} is torch.bfloat16" in self.complaint([model])

    def test_a_parameter_that_was_replaced(self) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        layer = model.decoder.layers[0].self_attention
        layer._parameters["A_log"] = nn.Parameter(layer.A_log.detach())
        assert "lost its mark keep_in_fp32" in self.complaint(model)

    def kept_by_hand(self) -> Any:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        keep_in_fp32(model, FINAL_NORM)
        check_fp32(model)
        return model

    def test_a_parameter_kept_by_hand_that_was_rounded(self) -> None:
        model = self.kept_by_hand()
        model.get_parameter(FINAL_NORM).data = model.get_parameter(FINAL_NORM).data.bfloat16()
        assert f"{FINAL_NORM} is torch.bfloat16" in self.complaint([model])

    def test_a_parameter_kept_by_hand_that_was_replaced(self) -> None:
        model = self.kept_by_hand()
        norm = model.decoder.final_layernorm
        norm.weight = nn.Parameter(norm.weight.detach())
        assert f"{FINAL_NORM} has lost its mark" in self.complaint(model)

    def test_a_module_with_a_kept_parameter_that_was_replaced(self) -> None:
        model = self.kept_by_hand()
        model.decoder.final_layernorm = stock_model().decoder.final_layernorm
        assert f"{FINAL_NORM} is not kept any more: its module was replaced" in self.complaint(model)

    def test_a_wrapper_around_a_module_with_a_kept_parameter_is_no_fault(self) -> None:
        model = self.kept_by_hand()
        model.decoder.final_layernorm = nn.Sequential(model.decoder.final_layernorm)
        check_fp32(model)

    @pytest.mark.parametrize("how", ["class", "method"])
    def test_a_module_that_lost_its_guard(self, how: str) -> None:
        model = self.kept_by_hand()
        norm = model.decoder.final_layernorm
        if how == "class":
            norm.__class__ = type(norm).__mro__[1]
        else:
            norm._apply = lambda fn, recurse=True: nn.Module._apply(norm, fn, recurse)
        assert "decoder.final_layernorm has lost its guard: a cast would round weight" in self.complaint(model)

    def test_a_kept_parameter_that_was_parametrized(self) -> None:
        model = self.kept_by_hand()
        torch.nn.utils.parametrize.register_parametrization(model.decoder.final_layernorm, "weight", nn.Identity())
        assert f"{FINAL_NORM} is not a parameter any more" in self.complaint(model)

    def test_main_grad_of_a_parameter_kept_by_hand(self) -> None:
        model = self.kept_by_hand()
        parameter = model.get_parameter(FINAL_NORM)
        parameter.main_grad = parameter.detach().bfloat16()
        assert f"{FINAL_NORM}.main_grad is torch.bfloat16" in self.complaint(model)

    def test_an_optimizer_that_took_a_parameter_for_16_bits_before_it_was_kept_by_hand(self) -> None:
        model = self.kept_by_hand()
        optimizer = argparse.Namespace(float16_groups=[[model.get_parameter(FINAL_NORM)]])
        assert f"built before {FINAL_NORM} was fp32" in self.complaint(model, optimizer=optimizer)

    def test_a_head_that_is_gone(self) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        model.head, model.output_layer = model.output_layer, None
        assert "no module called output_layer in GPTModel" in self.complaint(model)

    def test_a_parameter_that_is_not_there(self) -> None:
        model = stock_model()
        apply_fp32(model, Fp32Config(gated_delta_net=("A_log",)), weights="initialized")
        config = Fp32Config(gated_delta_net=("A_log", "D"))
        assert "self_attention has no parameter 'D'" in self.complaint(model, config)

    def test_the_parameters_that_megatron_fsdp_puts_in_place_stand_for_the_original(self) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        layer = model.decoder.layers[0].self_attention
        stand_in: Any = nn.Parameter(layer.A_log.detach().bfloat16())
        stand_in.orig_param = layer.A_log
        layer._parameters["A_log"] = stand_in
        check_fp32(model)

    def test_main_grad_of_another_dtype(self) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        parameter: Any = model.get_parameter(OUT_NORM)
        parameter.main_grad = torch.zeros(parameter.shape, dtype=torch.bfloat16)
        assert f"{OUT_NORM}.main_grad is torch.bfloat16" in self.complaint(model)

    @pytest.mark.parametrize("method", ["forward", "_forward_impl"])
    def test_a_method_that_was_replaced(self, method: str) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        setattr(model.output_layer, method, lambda *_: None)
        assert f"output_layer.{method} was replaced on the instance" in self.complaint(model)

    @pytest.mark.parametrize("method", ["forward", "_apply_gated_norm", "_apply"])
    def test_a_method_of_a_gated_delta_net_that_was_replaced(self, method: str) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        setattr(model.decoder.layers[0].self_attention, method, lambda *_: None)
        assert f"layers.0.self_attention.{method} was replaced on the instance" in self.complaint(model)

    def test_another_configuration(self) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        assert "expected Fp32Config" in self.complaint(model, Fp32Config(grad_precision="bf16x3"))

    def test_layers_that_never_ran(self) -> None:
        model = stock_model()
        apply_fp32(model, weights="initialized")
        text = self.complaint(model, after_forward=True)
        assert "output_layer never computed fp32 logits" in text
        assert "self_attention never ran with its kept parameters in fp32" in text

    @pytest.mark.parametrize("distributed", [True, False])
    def test_an_optimizer_without_its_repairs(self, distributed: bool) -> None:
        trainer = self.trainer(distributed_optimizer=distributed)
        text = self.complaint(trainer.model, optimizer=trainer.optimizer)
        assert ("distributed-index-map" if distributed else "float16-id-map") in text
        assert ("float16-id-map" if distributed else "distributed-index-map") not in text

    def test_an_optimizer_that_was_built_before_its_repairs(self) -> None:
        trainer = self.trainer()
        with install_optimizer_repairs():
            text = self.complaint(trainer.model, optimizer=trainer.optimizer)
        assert "built before install_optimizer_repairs: it would save the states of" in text

    @pytest.mark.parametrize("chunk", [0, 1])
    def test_a_parameter_of_any_chunk_among_the_16_bit_ones(self, chunk: int) -> None:
        chunks = [stock_model(stage={"post_process": False}), stock_model(stage={"pre_process": False})]
        apply_fp32(chunks, weights="initialized")
        optimizer = argparse.Namespace(float16_groups=[[chunks[chunk].get_parameter(A_LOG)]])
        assert f"built before chunk {chunk}: {A_LOG} was fp32" in self.complaint(chunks, optimizer=optimizer)

    def test_an_optimizer_that_was_built_too_early(self) -> None:
        model = stock_model()
        with install_optimizer_repairs():
            trainer = Trainer(model)
            for parameter in model.parameters():
                del parameter.main_grad
            apply_fp32(model, weights="initialized")
            assert "was built before" in self.complaint(trainer.model, optimizer=trainer.optimizer)

    def test_an_optimizer_on_the_cpu(self) -> None:
        with install_optimizer_repairs():
            trainer = self.trainer()
            inner = next(iter(getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])))
            check_fp32(trainer.model, optimizer=trainer.optimizer)
            inner.optimizer = object.__new__(HybridDeviceOptimizer)
            text = self.complaint(trainer.model, optimizer=trainer.optimizer)
        assert "optimizer_cpu_offload" in text
        assert "KeyError" in text

    @pytest.mark.parametrize("bare", [False, True])
    def test_gradients_of_two_dtypes_in_one_call(self, bare: bool) -> None:
        """The default of megatron-core, and what its interleaved schedule does to the second chunk."""
        model, optimizer = self.chunk(disable_bucketing=True, grad_reduce_in_fp32=False)
        text = self.complaint(model.module.module if bare else model, optimizer=optimizer if bare else None)
        assert "gradients of torch.bfloat16 and torch.float32 are reduced in one call" in text
        assert "grad_reduce_in_fp32=True" in text

    def test_parameters_of_two_dtypes_in_one_call_of_gloo(self) -> None:
        model, _ = self.chunk(disable_bucketing=True, grad_reduce_in_fp32=True)
        assert "which gloo does wrongly" in self.complaint(model)
        with mock.patch("torch.distributed.get_backend", return_value="nccl"):
            check_fp32(model)

    @pytest.mark.parametrize("grad_reduce_in_fp32", [True, False])
    def test_every_bucket_by_itself(self, grad_reduce_in_fp32: bool) -> None:
        check_fp32(self.chunk(disable_bucketing=False, grad_reduce_in_fp32=grad_reduce_in_fp32)[0])

    def chunk(self, *, disable_bucketing: bool, grad_reduce_in_fp32: bool) -> tuple[Any, Any]:
        """A wrapped model, and an optimizer that knows it."""
        model = stock_model()
        apply_fp32(model, weights="initialized")
        config = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=grad_reduce_in_fp32)
        wrapped = DistributedDataParallel(
            model.config, config, Float16Module(model.config, model), disable_bucketing=disable_bucketing
        )
        for parameter in model.parameters() if not grad_reduce_in_fp32 else ():
            del parameter.main_grad  # its dtype would be named too
        return wrapped, argparse.Namespace(chained_optimizers=[argparse.Namespace(model_chunks=[wrapped])])
