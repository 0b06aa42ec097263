"""`keep_in_fp32` on modules of every kind: those whose layout Python will not exchange, and those that it refuses."""

from __future__ import annotations

import abc
import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from torch import nn

from megatron_fp32.kept_parameters.keep_in_fp32 import keep_in_fp32, kept_parameters
from megatron_fp32.models.provider import cpu_overrides, transformer_config
from tests.qwen3_5 import tiny_qwen3_5
from tests.support import full_mantissa


class Leaf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(full_mantissa(8, seed=1))
        self.other = nn.Parameter(full_mantissa(8, seed=2))


class AbstractFirst(abc.ABC, Leaf):
    @abc.abstractmethod
    def route(self) -> None: ...


class Router(AbstractFirst):
    def route(self) -> None: ...


class Plain:
    pass


class PlainFirst(Plain, Leaf):
    pass


class Slotted(Leaf):
    __slots__ = ("extra",)


class Meta(type):
    pass


class WithMetaclass(Leaf, metaclass=Meta):
    pass


class Reducing(Leaf):
    def __reduce__(self) -> Any:
        return Reducing, (), self.__dict__


KINDS = [Leaf, Router, PlainFirst, Slotted, WithMetaclass, Reducing]


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_any_class_can_be_guarded(self, kind: Any) -> None:
        module = kind()
        keep_in_fp32(module, "weight")
        assert isinstance(module, kind)
        assert (type(module).__name__, type(module).__qualname__) == (kind.__name__, kind.__qualname__)
        assert list(module.state_dict()) == list(kind().state_dict())
        for copied in (copy.deepcopy(module), module) if kind is not Slotted else (module,):
            copied.bfloat16().half()
            assert torch.equal(copied.weight, full_mantissa(8, seed=1))
            assert copied.other.dtype == torch.float16
            copied.load_state_dict({n: v.bfloat16() for n, v in kind().state_dict().items()}, assign=True)
            assert copied.weight.dtype == torch.float32

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not Slotted])
    def test_pickle(self, kind: Any) -> None:
        module = kind()
        keep_in_fp32(module, "weight")
        loaded = pickle.loads(pickle.dumps(module)).bfloat16()
        assert torch.equal(loaded.weight, full_mantissa(8, seed=1))
        assert loaded.other.dtype == torch.bfloat16
        assert type(loaded) is type(module)

    def test_one_parameter_under_two_names_of_two_kinds(self) -> None:
        router, leaf = Router(), Leaf()
        leaf.other = router.weight
        model = nn.ModuleList([router, leaf])
        keep_in_fp32(model, "0.weight", "1.other")
        model.bfloat16()
        assert router.weight is leaf.other
        assert torch.equal(router.weight, full_mantissa(8, seed=1))
        assert {name for name, _ in kept_parameters(model)} == {"0.weight", "1.other"}

    @pytest.mark.parametrize("router_dtype", [None, "fp32"])
    def test_the_router_of_megatron_core(self, megatron: None, router_dtype: str | None) -> None:
        overrides = {**cpu_overrides(), "params_dtype": torch.bfloat16, "bf16": True, "num_moe_experts": 4}
        config = transformer_config(tiny_qwen3_5(), moe_router_dtype=router_dtype, **overrides)
        router = TopKRouter(config, pg_collection=ProcessGroupCollection.use_mpu_process_groups())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (found,) = keep_in_fp32(router, "weight")
        # Without a dtype of its own, router_gating_linear casts the weight to that of the input.
        assert [str(w.message)[:31] for w in caught] == (
            [] if router_dtype else ["weight: without moe_router_dtype"[:31]]
        )
        assert (found.note is None) == (router_dtype is not None)
        values = full_mantissa(*router.weight.shape, seed=3)
        with torch.no_grad():
            router.weight.copy_(values)
        wrapped = Float16Module(config, router).module
        assert torch.equal(wrapped.weight, values)
        assert wrapped.weight.sequence_parallel is False
        hidden = torch.randn(6, 2, config.hidden_size, dtype=torch.bfloat16)
        logits = wrapped.gating(hidden)
        weight = values if router_dtype else values.bfloat16().float()
        truth = hidden.double() @ weight.double().T
        assert (logits.double() - truth).abs().max() <= (1e-5 if router_dtype else 2**-7) * truth.abs().max()


class TestAllOrNothing:
    @pytest.mark.parametrize(
        "last", ["two.nothing", "three.weight", "buffer", "script.weight", "lazy.weight", "final.weight"]
    )
    def test_a_bad_last_name_changes_nothing(self, last: str) -> None:
        class Final(Leaf):
            def __init_subclass__(cls) -> None:
                raise RuntimeError("no subclass, please")

        model: Any = nn.Module()
        model.one, model.two, model.final = Router().bfloat16(), Leaf(), Final()
        model.script, model.lazy = torch.jit.script(nn.Linear(2, 2)), nn.LazyLinear(3)
        model.register_buffer("buffer", torch.zeros(2))
        with pytest.raises((ValueError, TypeError)):
            keep_in_fp32(model, "one.weight", "two.weight", last)
        assert type(model.one) is Router
        assert type(model.two) is Leaf
        assert type(model.final) is Final
        assert model.one.weight.dtype == torch.bfloat16
        assert not any(hasattr(p, "keep_in_fp32") for p in [*model.one.parameters(), *model.two.parameters()])
        assert not list(kept_parameters(model))
        assert vars(model.two).keys() == vars(Leaf()).keys()

    @pytest.mark.parametrize(
        ("module", "name", "error", "message"),
        [
            (torch.jit.script(nn.Linear(2, 2)), "weight", TypeError, "belongs to a ScriptModule"),
            (nn.LazyLinear(2), "weight", TypeError, "has no shape yet"),
            (nn.BatchNorm1d(2), "running_mean", ValueError, "it is a buffer, and only parameters are kept"),
            (
                nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
                "weight",
                ValueError,
                r"it is parametrized; name 'parametrizations.weight.original",
            ),
            (nn.Linear(2, 2), 3, TypeError, "keep_in_fp32 takes names"),
            ([nn.Linear(2, 2)], "weight", TypeError, "expected a module, got list"),
        ],
    )
    def test_what_is_refused_says_why(self, module: Any, name: Any, error: Any, message: str) -> None:
        with pytest.raises(error, match=message):
            keep_in_fp32(module, name)
