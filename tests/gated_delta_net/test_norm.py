"""The local spec's RMSNorm, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megatron_fp32.gated_delta_net.norm import PreLinearRMSNorm, RMSNorm
from megatron_fp32.kept_parameters.keep_in_fp32 import keep_in_fp32
from megatron_fp32.ops.logits.reference import relative_error

SIZE, EPS = 48, 1e-6
NORMS = [PreLinearRMSNorm, RMSNorm]


def config(**fields: Any) -> TransformerConfig:
    return TransformerConfig(
        **{"num_layers": 1, "hidden_size": SIZE, "num_attention_heads": 4, "normalization": "RMSNorm", **fields}
    )


def norm(cls: type[PreLinearRMSNorm] = RMSNorm, **fields: Any) -> PreLinearRMSNorm:
    module = cls(config(**fields), SIZE, EPS)
    with torch.no_grad():
        module.weight.add_(0.3 * torch.randn(SIZE))
    return module


def formula(x: Tensor, weight: Tensor, zero_centered: bool) -> Tensor:
    gamma = 1 + weight if zero_centered else weight
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * gamma


@pytest.mark.parametrize("cls", NORMS)
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_against_float64(
    cls: type[PreLinearRMSNorm], zero_centered: bool, weight_dtype: torch.dtype, input_dtype: torch.dtype
) -> None:
    module = norm(cls, layernorm_zero_centered_gamma=zero_centered, params_dtype=weight_dtype)
    x = torch.randn(6, 2, SIZE).to(input_dtype).requires_grad_()
    grad = torch.randn(6, 2, SIZE).to(weight_dtype)
    y = module(x)
    assert y.dtype == weight_dtype
    assert y.shape == x.shape
    actual = (y, *torch.autograd.grad(y, (x, module.weight), grad))

    # Torch's own error for the job: the formula in fp32, autograd, and one rounding of what leaves.
    results = []
    for dtype in (torch.float64, torch.float32):
        wide = [t.detach().to(dtype).requires_grad_() for t in (x, module.weight)]
        out = formula(*wide, zero_centered)
        results.append((out, *torch.autograd.grad(out, wide, grad.to(dtype))))
    truth, torchs = results
    for name, mine, true, plain in zip(("y", "dx", "dw"), actual, truth, torchs, strict=True):
        assert relative_error(mine, true) <= 2 * relative_error(plain.to(mine.dtype), true), name


def test_bf16_input_is_not_rounded_before_the_fp32_weight() -> None:
    module = norm(params_dtype=torch.float32)
    y = module(torch.randn(4, SIZE).bfloat16())
    assert not torch.equal(y, y.bfloat16().float())


@pytest.mark.parametrize("zero_centered", [False, True])
def test_it_starts_as_a_plain_normalization(zero_centered: bool) -> None:
    module = RMSNorm(config(layernorm_zero_centered_gamma=zero_centered), SIZE, EPS)
    x = torch.randn(4, SIZE)
    torch.testing.assert_close(module(x), nn.functional.rms_norm(x, (SIZE,), eps=EPS))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_weight_is_marked_for_sequence_parallel(sequence_parallel: bool) -> None:
    fields: dict[str, Any] = {"tensor_model_parallel_size": 2} if sequence_parallel else {}
    weight: Any = norm(sequence_parallel=sequence_parallel, **fields).weight
    assert weight.sequence_parallel is sequence_parallel


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("extra", [{}, {"_extra_state": None}, {"_extra_state": torch.zeros(4)}])
def test_it_loads_strictly_with_and_without_extra_state(guarded: bool, extra: dict[str, Any]) -> None:
    module = norm()
    if guarded:
        keep_in_fp32(module, "weight")
    outer = nn.ModuleDict({"out_norm": module})
    values = {"weight": torch.randn(SIZE), **extra}
    state = {f"out_norm.{key}": value for key, value in values.items()}
    before = list(state)
    outer.load_state_dict(state)
    assert torch.equal(module.weight, values["weight"])
    assert list(state) == before


def test_state_dict_keys_are_those_of_transformer_engine() -> None:
    # TENorm stores an _extra_state; the norm inside TELayerNormColumnParallelLinear does not have one of its own.
    assert list(norm(RMSNorm).state_dict()) == ["weight", "_extra_state"]
    assert list(norm(PreLinearRMSNorm).state_dict()) == ["weight"]


def test_other_missing_keys_are_still_missing() -> None:
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        norm().load_state_dict({})


@pytest.mark.parametrize("cls", NORMS)
def test_it_refuses_another_normalization(cls: type[PreLinearRMSNorm]) -> None:
    with pytest.raises(ValueError, match=r"expected config\.normalization 'RMSNorm', got 'LayerNorm'"):
        norm(cls, normalization="LayerNorm")


def test_print_shows_what_it_does() -> None:
    assert "48, eps=1e-06, zero_centered_gamma=True" in repr(norm(layernorm_zero_centered_gamma=True))
