"""Kept parameters through everything that can be done to the module around them, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from megatron_fp32.kept_parameters.keep_in_fp32 import KeptParameter, keep_in_fp32, kept_parameters
from tests.support import full_mantissa

KEPT = ("A_log", "norm.weight")
MARKS = {"tensor_model_parallel": True, "sequence_parallel": True}


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(full_mantissa(8, seed=1))


class Layer(nn.Module):
    """A layer with parameters to keep in it and below it, and others of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(full_mantissa(5, seed=2))
        self.dt_bias = nn.Parameter(full_mantissa(5, seed=3))
        self.norm = Norm()
        self.proj = nn.Linear(8, 5)
        self.register_buffer("scale", torch.ones(3))
        for parameter in (self.A_log, self.norm.weight):
            vars(parameter).update(MARKS)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])


def kept_layer() -> Layer:
    layer = Layer()
    keep_in_fp32(layer, *KEPT)
    return layer


def assert_kept(layer: nn.Module, *, marks: bool = True, others: torch.dtype | None = torch.bfloat16) -> None:
    """`A_log` and the norm hold the bits that the constructor drew; everything else is `others`."""
    truth = Layer()
    for name in KEPT:
        parameter: Any = layer.get_parameter(name)
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.view(torch.int32), truth.get_parameter(name).view(torch.int32)), name
        assert parameter.keep_in_fp32
        if marks:
            assert {key: getattr(parameter, key, None) for key in MARKS} == MARKS, name
    assert {name for name, _ in kept_parameters(layer)} == set(KEPT)
    if others is not None:
        rest = {name: p.dtype for name, p in layer.named_parameters() if name not in KEPT}
        assert set(rest.values()) == {others}, rest


@contextlib.contextmanager
def torch_future(**switches: bool) -> Iterator[None]:
    getters = {name: getattr(torch.__future__, f"get_{name}") for name in switches}
    before = {name: get() for name, get in getters.items()}
    try:
        for name, value in switches.items():
            getattr(torch.__future__, f"set_{name}")(value)
        yield
    finally:
        for name, value in before.items():
            getattr(torch.__future__, f"set_{name}")(value)


class TestCasts:
    @pytest.mark.parametrize(
        ("cast", "others"),
        [
            (lambda m: m.bfloat16(), torch.bfloat16),
            (lambda m: m.half(), torch.float16),
            (lambda m: m.to(torch.bfloat16), torch.bfloat16),
            (lambda m: m.to(dtype=torch.float16), torch.float16),
            (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
            (lambda m: m.to(torch.empty(0, dtype=torch.float16)), torch.float16),
            (lambda m: m.type(torch.bfloat16), torch.bfloat16),
            (lambda m: m.bfloat16().float(), torch.float32),
            (lambda m: m.double().bfloat16(), torch.bfloat16),
            (lambda m: m.half().bfloat16().half(), torch.float16),
        ],
        ids=["bfloat16", "half", "to", "to dtype=", "to device", "to tensor", "type", "float", "double first", "chain"],
    )
    def test_a_cast(self, cast: Callable[[nn.Module], nn.Module], others: torch.dtype) -> None:
        layer = kept_layer()
        assert cast(layer) is layer
        assert_kept(layer, others=others)
        assert layer.scale.dtype == others

    def test_double_is_obeyed(self) -> None:
        layer = kept_layer().double()
        assert layer.A_log.dtype == torch.float64
        assert torch.equal(layer.A_log, Layer().A_log.double())

    @settings(max_examples=25, deadline=None)
    @given(casts=st.lists(st.sampled_from(["bfloat16", "half", "float", "double"]), max_size=6))
    def test_any_sequence_of_casts_ends_with_the_same_bits(self, casts: list[str]) -> None:
        layer = kept_layer()
        for cast in [*casts, "bfloat16"]:
            getattr(layer, cast)()
        assert_kept(layer)

    @pytest.mark.parametrize("field", ["bf16", "fp16"])
    def test_float16_module(self, megatron: None, field: str) -> None:
        config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **{field: True})
        wrapped = Float16Module(config, kept_layer())
        assert_kept(wrapped.module, others={"bf16": torch.bfloat16, "fp16": torch.float16}[field])

    def test_gradients_are_cast_with_their_parameters(self) -> None:
        layer = kept_layer()
        for parameter in layer.parameters():
            parameter.grad = full_mantissa(*parameter.shape, seed=9)
        layer.bfloat16()
        assert_kept(layer)
        for name in KEPT:
            assert torch.equal(layer.get_parameter(name).grad, full_mantissa(*layer.get_parameter(name).shape, seed=9))
        assert layer.dt_bias.grad.dtype == torch.bfloat16

    @pytest.mark.parametrize(
        "switch",
        [
            "overwrite_module_params_on_conversion",
            "swap_module_params_on_conversion",
        ],
    )
    @pytest.mark.parametrize("with_grad", [False, True])
    def test_under_torchs_other_ways_to_convert(self, switch: str, with_grad: bool) -> None:
        layer = kept_layer()
        if with_grad:
            for parameter in layer.parameters():
                parameter.grad = torch.ones_like(parameter)
        with torch_future(**{switch: True}):
            layer.half().bfloat16()
        assert_kept(layer)
        if with_grad:
            assert layer.A_log.grad.dtype == torch.float32

    def test_a_kept_parameter_deep_in_a_model(self) -> None:
        model = Model()
        keep_in_fp32(model, "layers.1.A_log", "layers.1.norm.weight")
        model.bfloat16()
        assert_kept(model.layers[1])
        assert {p.dtype for p in model.layers[0].parameters()} == {torch.bfloat16}
        assert {name for name, _ in kept_parameters(model)} == {"layers.1.A_log", "layers.1.norm.weight"}


class TestCopies:
    def test_deepcopy(self) -> None:
        layer = kept_layer()
        copied = copy.deepcopy(layer)
        assert copied.A_log is not layer.A_log
        copied.bfloat16()
        assert_kept(copied, marks=False)  # nn.Parameter's own deepcopy drops attributes
        assert layer.dt_bias.dtype == torch.float32

    @pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
    def test_pickle(self, protocol: int) -> None:
        assert_kept(pickle.loads(pickle.dumps(kept_layer(), protocol)).bfloat16())

    def test_torch_save_and_load(self) -> None:
        buffer = io.BytesIO()
        torch.save(kept_layer(), buffer)
        buffer.seek(0)
        assert_kept(torch.load(buffer, weights_only=False).bfloat16())

    def test_a_copy_of_a_copy(self) -> None:
        layer = pickle.loads(pickle.dumps(copy.deepcopy(kept_layer()).bfloat16())).half()
        assert_kept(layer, marks=False, others=torch.float16)
        assert type(layer) is type(kept_layer())

    def test_exponential_moving_average(self) -> None:
        averaged = AveragedModel(kept_layer(), multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
        averaged.update_parameters(kept_layer())
        averaged.bfloat16()
        assert_kept(averaged.module, marks=False)

    @pytest.mark.parametrize("cast", ["bfloat16", "half"])
    def test_meta_cast_and_materialized(self, cast: str) -> None:
        with torch.device("meta"):
            layer = Layer()
        report = keep_in_fp32(layer, *KEPT)
        assert [kept.on_bf16_grid for kept in report] == [None, None]
        for parameter in (layer.A_log, layer.norm.weight):
            vars(parameter).update(MARKS)
        getattr(layer, cast)()
        assert layer.A_log.is_meta
        assert layer.A_log.dtype == torch.float32
        layer.to_empty(device="cpu")
        assert layer.A_log.device.type == "cpu"
        layer.load_state_dict(Layer().state_dict())
        assert_kept(layer, others=torch.bfloat16 if cast == "bfloat16" else torch.float16)


class TestLoading:
    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("cast_first", [False, True])
    def test_fp32_values_arrive_unrounded(self, assign: bool, cast_first: bool) -> None:
        layer = kept_layer()
        values = Layer().state_dict()
        with torch.no_grad():
            layer.A_log.zero_()
            layer.norm.weight.zero_()
        if cast_first:
            layer.bfloat16()
        layer.load_state_dict(values, assign=assign)
        layer.bfloat16()
        assert_kept(layer)

    @pytest.mark.parametrize("assign", [False, True])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_values_of_another_dtype_become_fp32(self, assign: bool, dtype: torch.dtype) -> None:
        layer = kept_layer().bfloat16()
        values = {name: (2 * value).to(dtype) for name, value in Layer().state_dict().items()}
        layer.load_state_dict(values, assign=assign)
        for name in KEPT:
            parameter: Any = layer.get_parameter(name)
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, values[name].float())
            assert parameter.keep_in_fp32
            assert parameter.tensor_model_parallel
            assert parameter.requires_grad
        assert layer.dt_bias.dtype == (dtype if assign else torch.bfloat16)

    def test_assign_keeps_a_frozen_parameter_frozen(self) -> None:
        layer = kept_layer()
        layer.A_log.requires_grad_(False)
        layer.load_state_dict({name: v.bfloat16() for name, v in Layer().state_dict().items()}, assign=True)
        assert not layer.A_log.requires_grad
        assert layer.norm.weight.requires_grad

    def test_assign_into_meta_parameters(self) -> None:
        with torch.device("meta"):
            layer = Layer()
        keep_in_fp32(layer, *KEPT)
        layer.bfloat16()
        layer.load_state_dict({n: v.clone() for n, v in Layer().state_dict().items()}, assign=True)
        assert_kept(layer.bfloat16(), marks=False)

    def test_loading_under_torchs_swap(self) -> None:
        layer = kept_layer()
        with torch_future(swap_module_params_on_conversion=True):
            layer.load_state_dict(Layer().state_dict())
        assert_kept(layer.bfloat16())


class TestTakingOver:
    def test_nothing_but_the_class_and_the_marks_change(self) -> None:
        plain, layer = Layer(), Layer()
        parameters = dict(layer.named_parameters())
        hook_calls: list[str] = []
        layer.register_forward_pre_hook(lambda *_: hook_calls.append("module"))
        layer.A_log.register_hook(lambda grad: hook_calls.append("parameter"))
        keep_in_fp32(layer, *KEPT)

        assert isinstance(layer, Layer)
        assert type(layer).__name__ == "Layer"
        assert type(layer).__qualname__ == Layer.__qualname__
        assert type(layer).__module__ == Layer.__module__
        assert type(layer.norm).__name__ == "Norm"
        assert list(layer.state_dict()) == list(plain.state_dict())
        assert all(parameter is parameters[name] for name, parameter in layer.named_parameters())
        assert repr(layer) == repr(plain)
        layer.A_log.sum().backward()
        assert hook_calls == ["parameter"]
        with pytest.raises(NotImplementedError):  # from forward, after the hook
            layer()
        assert hook_calls == ["parameter", "module"]

    def test_the_marks_that_others_read(self) -> None:
        layer: Any = kept_layer()
        assert layer.A_log.keep_in_fp32 is True
        assert layer.norm.weight.keep_in_fp32 is True
        assert not hasattr(layer.dt_bias, "keep_in_fp32")
        # Megatron-Bridge reads vars(submodule) and looks for direct parameters.
        assert vars(layer)["_keep_in_float32_parameter_names"] == ("A_log",)
        assert vars(layer.norm)["_keep_in_float32_parameter_names"] == ("weight",)

    def test_twice_is_once(self) -> None:
        layer = kept_layer()
        cls = type(layer)
        keep_in_fp32(layer, *KEPT)
        keep_in_fp32(layer, "dt_bias")
        assert type(layer) is cls
        assert vars(layer)["_keep_in_float32_parameter_names"] == ("A_log", "dt_bias")
        layer.bfloat16()
        assert torch.equal(layer.dt_bias, Layer().dt_bias)

    def test_every_owner_of_a_shared_parameter_is_guarded(self) -> None:
        embedding, head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
        head.weight = embedding.weight
        model = nn.ModuleList([embedding, head])
        before = embedding.weight.detach().clone()
        keep_in_fp32(model, "0.weight")
        model.bfloat16()
        assert embedding.weight is head.weight
        assert embedding.weight.dtype == torch.float32
        assert torch.equal(embedding.weight, before)

    def test_other_instances_of_the_class_are_not_guarded(self) -> None:
        kept_layer()
        assert Layer().bfloat16().A_log.dtype == torch.bfloat16

    def test_a_16_bit_parameter_becomes_fp32_in_place(self) -> None:
        layer = Layer().bfloat16()
        parameter, rounded = layer.A_log, layer.A_log.detach().clone()
        keep_in_fp32(layer, "A_log")
        assert layer.A_log is parameter
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, rounded.float())

    @pytest.mark.parametrize(
        ("values", "dtype", "on_grid"),
        [
            ([1.0, -0.5, 0.0], torch.float32, True),
            ([1.0, 1 + 2.0**-8], torch.float32, False),
            pytest.param(*([float("nan"), 2.0], torch.float32, True)),
            ([1.0, 1 + 2.0**-7], torch.bfloat16, True),
            ([1.0, 1 + 2.0**-10], torch.float16, False),
            ([1.0, 1 + 2.0**-40], torch.float64, True),  # after the cast to fp32, which is what is kept
        ],
    )
    def test_the_report(self, values: list[float], dtype: torch.dtype, on_grid: bool) -> None:
        module = nn.Module()
        module.w = nn.Parameter(torch.tensor(values, dtype=dtype))
        assert keep_in_fp32(module, "w") == (KeptParameter(name="w", previous_dtype=dtype, on_bf16_grid=on_grid),)

    def test_the_report_is_in_the_order_of_the_names(self) -> None:
        assert [kept.name for kept in keep_in_fp32(Layer(), *reversed(KEPT))] == list(reversed(KEPT))


class TestRefusals:
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ((), "needs at least one parameter name"),
            (("a_log",), "Layer has no parameter 'a_log'; it has: A_log, dt_bias, norm.weight"),
            (("A_log", "norm.bias"), "Layer has no parameter 'norm.bias'"),
            (("scale",), "Layer has no parameter 'scale'"),
            (("out_norm.weight",), "Layer has no submodule 'out_norm' for the parameter 'out_norm.weight'"),
        ],
    )
    def test_names(self, names: tuple[str, ...], message: str) -> None:
        layer = Layer()
        with pytest.raises(ValueError, match=message):
            keep_in_fp32(layer, *names)
        # All or nothing: the names before the wrong one were not taken over.
        assert type(layer) is Layer
        assert not list(kept_parameters(layer))

    def test_a_parameter_that_is_no_floating_point_number(self) -> None:
        module = nn.Module()
        module.w = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
        with pytest.raises(TypeError, match=r"'w' must be a plain floating-point tensor .* got Tensor of torch.int64"):
            keep_in_fp32(module, "w")

    def test_a_tensor_subclass(self) -> None:
        class Quantized(Tensor):
            pass

        module = nn.Module()
        module.w = nn.Parameter(torch.zeros(3).as_subclass(Quantized))
        with pytest.raises(TypeError, match=r"must be a plain floating-point tensor .* got Quantized"):
            keep_in_fp32(module, "w")

    def test_a_16_bit_parameter_that_ddp_owns(self) -> None:
        layer: Any = Layer().bfloat16()
        layer.A_log.main_grad = torch.zeros(5)
        with pytest.raises(ValueError, match="already belongs to DistributedDataParallel"):
            keep_in_fp32(layer, "A_log")
        layer.float()
        keep_in_fp32(layer, "A_log")  # nothing changes its dtype: allowed
