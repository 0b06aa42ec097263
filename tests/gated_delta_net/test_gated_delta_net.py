"""`Fp32GatedDeltaNet` on one rank. Its gradients over ranks are in test_ranks.py."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from torch import Tensor

from megatron_fp32.gated_delta_net.layer import Fp32GatedDeltaNet, to_fp32_gated_delta_net
from megatron_fp32.gated_delta_net.norm import RMSNorm
from megatron_fp32.kept_parameters.forward_dtypes import GATED_DELTA_NET_FP32_PARAMETERS
from megatron_fp32.kept_parameters.keep_in_fp32 import keep_in_fp32, kept_parameters
from tests.gated_delta_net.layers import MODEL, build, load, random_weights

pytestmark = pytest.mark.usefixtures("megatron")

KEPT = {"A_log", "out_norm.weight"}


def on_bf16_grid(tensor: Tensor) -> Tensor:
    return tensor == tensor.bfloat16().float()


def hidden_states(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 2, MODEL.hidden_size).to(dtype)


def dtypes(layer: torch.nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in layer.named_parameters()}


class TestConstruction:
    def test_a_log_is_drawn_in_fp32_in_its_range(self) -> None:
        draws = []
        for seed in range(16):
            model_parallel_cuda_manual_seed(seed)
            draws.append(build(Fp32GatedDeltaNet).A_log.detach())
        a_log = torch.cat(draws)
        assert a_log.dtype == torch.float32
        assert a_log.min() >= 0  # log 1
        assert a_log.max() <= math.log(16)
        # A value of random bits lies on the bf16 grid once in 65536.
        assert not on_bf16_grid(a_log).any()
        # The range itself is uniform, not its logarithm: half of the draws lie above 8.5.
        assert 0.25 < (a_log.exp() > 8.5).float().mean() < 0.75

    def test_a_log_is_what_a_stock_layer_draws_in_fp32(self) -> None:
        """From the same random numbers, and not from those that megatron-core draws next."""
        drawn = []
        for cls, dtype in ((GatedDeltaNet, torch.float32), (Fp32GatedDeltaNet, torch.bfloat16)):
            torch.manual_seed(3)
            model_parallel_cuda_manual_seed(7)
            drawn.append(build(cls, params_dtype=dtype).A_log)
        assert torch.equal(*drawn)

    def test_another_range(self) -> None:
        a_log = build(Fp32GatedDeltaNet, A_init_range=(2, 3)).A_log
        assert math.log(2) <= a_log.min()
        assert a_log.max() <= math.log(3)

    def test_the_stock_layer_rounds_a_log_so_the_test_above_can_fail(self) -> None:
        assert on_bf16_grid(build(GatedDeltaNet).A_log.float()).all()

    def test_what_is_not_kept_is_in_params_dtype(self) -> None:
        layer = build(Fp32GatedDeltaNet)
        assert {name for name, dtype in dtypes(layer).items() if dtype == torch.float32} == KEPT
        assert {dtype for name, dtype in dtypes(layer).items() if name not in KEPT} == {torch.bfloat16}
        assert {name for name, _ in kept_parameters(layer)} == KEPT
        assert torch.equal(layer.dt_bias, torch.ones_like(layer.dt_bias))

    @pytest.mark.parametrize("names", [("A_log",), ("A_log", "dt_bias"), ("out_norm.weight",), ()], ids="+".join)
    def test_other_parameters_may_be_kept(self, names: tuple[str, ...]) -> None:
        layer = build(Fp32GatedDeltaNet, fp32_parameters=names).bfloat16()
        assert {name for name, dtype in dtypes(layer).items() if dtype == torch.float32} == set(names)
        if "dt_bias" in names:
            assert torch.equal(layer.dt_bias, torch.ones_like(layer.dt_bias))

    @pytest.mark.parametrize("name", ["conv1d.weight", "in_proj.weight", "out_proj.weight"])
    def test_what_the_forward_pass_cannot_take_is_refused(self, name: str) -> None:
        message = f"'{name}' of a GatedDeltaNet cannot be kept in fp32: the forward pass multiplies"
        with pytest.raises(ValueError, match=message):
            build(Fp32GatedDeltaNet, fp32_parameters=("A_log", name))
        stock = build(GatedDeltaNet)
        with pytest.raises(ValueError, match=message):
            to_fp32_gated_delta_net(stock, ("A_log", name), weights="initialized")
        model = torch.nn.ModuleDict({"attention": stock})
        with pytest.raises(ValueError, match=message):
            keep_in_fp32(model, "attention.A_log", f"attention.{name}")
        assert type(stock) is GatedDeltaNet
        assert not list(kept_parameters(stock))

    def test_the_table_of_what_the_forward_pass_takes(self) -> None:
        """Each parameter alone in fp32: the pass runs, or torch refuses operands of two dtypes."""
        takes = set()
        names = [name for name, _ in build(GatedDeltaNet, conv_bias=True).named_parameters()]
        for name in names:
            layer = build(GatedDeltaNet, conv_bias=True)
            parameter = layer.get_parameter(name)
            parameter.data = torch.randn(parameter.shape)
            try:
                output, _ = layer(hidden_states(torch.bfloat16), None)
            except RuntimeError as error:
                if "type" not in str(error):
                    raise
                continue
            assert output.dtype == torch.bfloat16
            takes.add(name)
        assert takes == set(GATED_DELTA_NET_FP32_PARAMETERS)

    @pytest.mark.parametrize("how", ["built", "converted", "by hand"])
    def test_parameters_can_be_reset_when_dt_bias_is_kept(self, how: str) -> None:
        kept = ("A_log", "dt_bias")
        layer = build(Fp32GatedDeltaNet, fp32_parameters=kept) if how == "built" else build(GatedDeltaNet)
        if how == "converted":
            to_fp32_gated_delta_net(layer, kept, weights="initialized")
        elif how == "by hand":
            keep_in_fp32(layer, *kept)
        storage = layer.dt_bias.data_ptr()
        with torch.no_grad():
            layer.dt_bias.fill_(3)
            layer.A_log.fill_(-1)
        layer.reset_parameters()
        assert layer.dt_bias.data_ptr() == storage  # DDP's buffer would be left otherwise
        assert layer.dt_bias.dtype == torch.float32
        assert torch.equal(layer.dt_bias, torch.ones_like(layer.dt_bias))
        assert layer.A_log.min() >= 0
        layer(hidden_states(torch.bfloat16), None)

    @pytest.mark.parametrize("conv_init", [None, 0.5])
    def test_random_numbers_after_the_layer_are_those_after_a_stock_one(self, conv_init: float | None) -> None:
        layers, after = [], []
        for cls in (GatedDeltaNet, Fp32GatedDeltaNet):
            torch.manual_seed(4)  # torch's own Conv1d draws from the default generator
            model_parallel_cuda_manual_seed(3)
            layers.append(build(cls, conv_init=conv_init))
            with get_cuda_rng_tracker().fork():
                after.append(torch.rand(8))
        assert torch.equal(*after)
        for name in ("in_proj.weight", "conv1d.weight", "out_proj.weight", "dt_bias"):
            assert torch.equal(*(layer.get_parameter(name) for layer in layers)), name
        assert not on_bf16_grid(layers[1].A_log).any()

    @pytest.mark.parametrize("name", ["a_log", "out_norm", "in_norm.weight", ""])
    def test_a_wrong_name(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"(no parameter|no submodule) .*{name}"):
            build(Fp32GatedDeltaNet, fp32_parameters=("A_log", name))

    def test_without_initialization_nothing_is_drawn(self) -> None:
        before = torch.get_rng_state()
        layer = build(Fp32GatedDeltaNet, config={"perform_initialization": False})
        assert layer.A_log.dtype == torch.float32
        assert layer.A_log.isnan().all()  # fresh memory is NaN in these tests: nobody wrote to it
        torch.set_rng_state(before)
        model_parallel_cuda_manual_seed(7)
        first = build(Fp32GatedDeltaNet).A_log
        model_parallel_cuda_manual_seed(7)
        build(Fp32GatedDeltaNet, config={"perform_initialization": False})
        assert torch.equal(build(Fp32GatedDeltaNet).A_log, first)

    def test_the_names_that_others_match_on(self) -> None:
        assert Fp32GatedDeltaNet.__name__ == "GatedDeltaNet"
        assert pickle.loads(pickle.dumps(Fp32GatedDeltaNet)) is Fp32GatedDeltaNet
        assert type(build(Fp32GatedDeltaNet)) is Fp32GatedDeltaNet
        assert list(build(Fp32GatedDeltaNet).state_dict()) == list(build(GatedDeltaNet).state_dict())


class TestKeeping:
    def test_float16_module_keeps_the_bits(self) -> None:
        layer = build(Fp32GatedDeltaNet)
        weights = random_weights()
        load(layer, weights)
        wrapped = Float16Module(layer.config, layer).module
        for name in KEPT:
            assert wrapped.get_parameter(name).dtype == torch.float32
            assert torch.equal(wrapped.get_parameter(name), weights[name])
        assert wrapped.in_proj.weight.dtype == torch.bfloat16

    def test_attributes_of_the_parameters_stay(self) -> None:
        layer = build(Fp32GatedDeltaNet).bfloat16()
        assert layer.A_log.tensor_model_parallel
        assert layer.out_norm.weight.sequence_parallel is False

    def test_deepcopy_shares_the_process_groups_and_nothing_else(self) -> None:
        layer = build(Fp32GatedDeltaNet)
        load(layer, random_weights())
        copied = copy.deepcopy(layer)
        assert type(copied) is Fp32GatedDeltaNet
        assert copied.pg_collection.tp is layer.pg_collection.tp
        assert copied.in_proj.tp_group is layer.in_proj.tp_group
        assert copied.A_log is not layer.A_log
        copied.bfloat16()
        for name in KEPT:
            assert torch.equal(copied.get_parameter(name), random_weights()[name])
        x = hidden_states(torch.bfloat16)
        assert torch.equal(copied(x, None)[0], layer(x, None)[0])


class TestForward:
    def test_equals_the_stock_layer_where_everything_is_fp32(self) -> None:
        ours, stock = (build(cls, params_dtype=torch.float32) for cls in (Fp32GatedDeltaNet, GatedDeltaNet))
        for layer in (ours, stock):
            load(layer, random_weights())
        x = hidden_states()
        grad = torch.randn_like(x)
        outputs = []
        for layer in (ours, stock):
            out, bias = layer(x, None)
            assert bias is None
            grads = torch.autograd.grad(out, list(layer.parameters()), grad)
            outputs.append([out, *grads])
        assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))

    def test_the_kept_bits_reach_the_result(self) -> None:
        layer = build(Fp32GatedDeltaNet).bfloat16()
        load(layer, random_weights())
        x = hidden_states(torch.bfloat16)
        results = []
        for _ in range(2):
            grads = torch.autograd.grad(layer(x, None)[0].float().square().sum(), layer.A_log)
            results.append(grads[0])
            with torch.no_grad():
                layer.A_log.copy_(layer.A_log.bfloat16())
        assert results[0].dtype == torch.float32
        assert not torch.equal(*results)

    def test_a_pass_counts_only_while_everything_kept_is_fp32(self) -> None:
        layer: Any = build(Fp32GatedDeltaNet).bfloat16()
        assert layer.fp32_calls == 0
        x = hidden_states(torch.bfloat16)
        layer(x, None)
        layer(x, None)
        assert layer.fp32_calls == 2
        layer.A_log.data = layer.A_log.data.bfloat16()  # around the guard
        layer(x, None)
        assert layer.fp32_calls == 2


class TestTransformerEngineNorm:
    """Its norm would write fp32 to memory for the gate; ours is compiled together with the gate."""

    @pytest.fixture
    def norm_class(self) -> type[torch.nn.Module]:
        class Norm(RMSNorm):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                raise AssertionError("the norm of Transformer Engine ran")

        Norm.__module__ = "transformer_engine.pytorch.module.rmsnorm"
        return Norm

    def engine_layer(self, cls: Any, norm_class: Any, **kwargs: Any) -> Any:
        return build(cls, out_norm=norm_class, **kwargs)

    @pytest.mark.parametrize("converted", [False, True])
    def test_it_is_replaced_with_parameter_keys_and_result_kept(self, norm_class: Any, converted: bool) -> None:
        stock = self.engine_layer(GatedDeltaNet, norm_class)
        keys, parameter = list(stock.state_dict()), stock.out_norm.weight
        if converted:
            to_fp32_gated_delta_net(stock, weights="loaded")
            layer = stock
            assert layer.out_norm.weight is parameter
        else:
            layer = self.engine_layer(Fp32GatedDeltaNet, norm_class)
        assert list(layer.state_dict()) == keys
        assert layer.out_norm.weight.dtype == torch.float32
        reference = build(Fp32GatedDeltaNet)
        weights = random_weights()
        load(layer, weights)
        load(reference, weights)
        hidden = torch.randn(8, 2, MODEL.hidden_size).bfloat16()
        assert torch.equal(layer(hidden, None)[0], reference(hidden, None)[0])
        assert layer.bfloat16().out_norm.weight.dtype == torch.float32

    def test_it_stays_where_its_weight_is_not_kept(self, norm_class: Any) -> None:
        layer = self.engine_layer(Fp32GatedDeltaNet, norm_class, fp32_parameters=("A_log",))
        assert isinstance(layer.out_norm, norm_class)


def test_norm_and_gate_are_compiled_once_for_all_layers_whatever_hooks_they_have() -> None:
    """DDP with overlap_param_gather hooks every module, each with something else."""
    layers, buckets = [build(Fp32GatedDeltaNet) for _ in range(4)], {}

    def gather_into(bucket: object) -> Any:
        def hook(module: torch.nn.Module, _: Any) -> None:
            assert buckets[module.weight] is bucket

        return hook

    for layer in layers:
        buckets[layer.out_norm.weight] = object()
        layer.out_norm.register_forward_pre_hook(gather_into(buckets[layer.out_norm.weight]))
    x, gate = torch.randn(6, 16).bfloat16(), torch.randn(6, 16).bfloat16()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.compiler.set_stance("default", force_backend="eager"):
        compiled = [layer._apply_gated_norm(x, gate) for layer in layers]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    stock = build(GatedDeltaNet, params_dtype=torch.float32)
    assert torch.equal(compiled[0], stock._apply_gated_norm(x, gate))
