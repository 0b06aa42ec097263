"""`cpu_megatron` answers for CUDA inside its block and leaves nothing behind."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe import moe_utils

from megatron_fp32.testing.cpu import cpu_megatron, model_parallel, single_process

MISSING = object()
ROUTER_LACKS_A_NAME = not hasattr(moe_utils, "te_general_gemm")  # megatron-core 0.16 without Transformer Engine


def gated_delta_net_modules() -> list[Any]:
    names = [f"megatron.core.ssm.gated_delta_net{part}" for part in ("", ".common", ".gdn")]
    found = []
    for name in names:
        with contextlib.suppress(ModuleNotFoundError):
            found.append(importlib.import_module(name))
    return found


def compiles() -> bool:
    """`torch.compile` reaches its backend."""
    seen: list[bool] = []

    def backend(graph: Any, _: Any) -> Any:
        seen.append(True)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    return bool(seen)


def snapshot() -> dict[str, Any]:
    state: dict[str, Any] = {
        "current_device": torch.cuda.current_device,
        "current_stream": torch.cuda.current_stream,
        "synchronize": torch.cuda.synchronize,
        "tracker": megatron_random._CUDA_RNG_STATE_TRACKER,
        "tracker initialized": megatron_random._CUDA_RNG_STATE_TRACKER_INITIALIZED,
        "type": torch.zeros(1).type(),
        "compiles": compiles(),
    }
    for module in gated_delta_net_modules():
        for name in ("l2norm", "HAVE_FLA"):
            state[f"{module.__name__}.{name}"] = getattr(module, name, MISSING)
    if ROUTER_LACKS_A_NAME:
        state["te_general_gemm"] = getattr(moe_utils, "te_general_gemm", MISSING)
    return state


def assert_undone(before: dict[str, Any]) -> None:
    after = snapshot()
    assert {name for name in before if after[name] is not before[name] and after[name] != before[name]} == set()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.cuda.current_device()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1).cuda()
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_inside_cuda_names_mean_the_cpu() -> None:
    with cpu_megatron():
        assert torch.cuda.current_device() == torch.device("cpu")
        torch.cuda.synchronize()
        torch.cuda.current_stream().wait_stream(torch.cuda.current_stream())
        x = torch.ones(2, dtype=torch.bfloat16)
        assert x.cuda() is x
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1, device=torch.device("cuda", 0)).device.type == "cpu"
        assert torch.zeros(1, device="meta").is_meta
        # What the optimizers dispatch on.
        assert x.type() == "torch.cuda.BFloat16Tensor"
        assert x.float().type() == "torch.cuda.FloatTensor"
        assert x.type(torch.float16).dtype == torch.float16


def test_everything_is_undone() -> None:
    before = snapshot()
    assert before["type"] == "torch.FloatTensor"
    with cpu_megatron(), single_process(), model_parallel(seed=3):
        changed = snapshot()
        assert {name for name in before if changed[name] == before[name]} == set()
    assert_undone(before)


def test_everything_is_undone_after_an_exception() -> None:
    before = snapshot()
    with pytest.raises(ZeroDivisionError), cpu_megatron(), single_process(), model_parallel():
        raise ZeroDivisionError
    assert_undone(before)
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()


def test_blocks_nest() -> None:
    before = snapshot()
    with cpu_megatron():
        with cpu_megatron():
            assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
        assert torch.cuda.current_device() == torch.device("cpu")
    assert_undone(before)


def test_it_refuses_a_machine_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="for machines without CUDA"), cpu_megatron():
        pass


def test_megatrons_generator_draws_what_its_seed_says() -> None:
    with cpu_megatron(), single_process():
        draws = []
        for seed in (5, 6, 5):
            with model_parallel(seed=seed):
                outside = torch.get_rng_state()
                with megatron_random.get_cuda_rng_tracker().fork():
                    first = torch.rand(4)
                assert torch.equal(torch.get_rng_state(), outside)
                with megatron_random.get_cuda_rng_tracker().fork():
                    draws.append(torch.cat([first, torch.rand(4)]))
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0][:4], draws[0][4:])


def test_an_unknown_generator_is_named() -> None:
    with cpu_megatron(), single_process(), model_parallel():
        tracker = megatron_random.get_cuda_rng_tracker()
        with pytest.raises(ValueError, match="there is no rng state 'nothing'"), tracker.fork("nothing"):
            pass
        with pytest.raises(ValueError, match="exists already"):
            tracker.add(megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME, 1)


def test_l2norm_is_flas() -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    with cpu_megatron():
        normed = importlib.import_module("megatron.core.ssm.gated_delta_net").l2norm
        y = normed(x)
        wide = normed(x, output_dtype=torch.float32)
    truth = x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert (y.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, truth.bfloat16())
    torch.testing.assert_close(wide.double(), truth, rtol=4 * torch.finfo(torch.float32).eps, atol=0)


def test_model_parallel_may_be_entered_again() -> None:
    with cpu_megatron(), single_process():
        for _ in range(2):
            with model_parallel():
                assert parallel_state.get_tensor_model_parallel_world_size() == 1
            assert not parallel_state.model_parallel_is_initialized()
