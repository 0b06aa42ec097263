"""Build and train megatron-core models on a machine without a GPU.

megatron-core uses the current CUDA device, its generator and its streams in many places. `cpu_megatron()` replaces them
by the CPU inside a `with` block and puts them back on exit. It is for tests and demonstrations. Configure the model
with `deterministic_mode=True`, `transformer_impl="local"` and every fusion off, so that no CUDA kernel is selected.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

from megatron_fp32.validation import check_choice, check_count


@contextlib.contextmanager
def cpu_megatron() -> Iterator[None]:
    """Let megatron-core build, train and save on the CPU inside the block.

    Raises:
        RuntimeError: when CUDA is available, because megatron-core then works without `cpu_megatron`.
    """
    if torch.cuda.is_available():
        raise RuntimeError("cpu_megatron() is for machines without CUDA; a GPU is available here")
    from megatron_fp32 import needs_megatron  # noqa: F401

    # isort: split
    from megatron.core.tensor_parallel import random as megatron_random

    with contextlib.ExitStack() as stack:
        # torch.compile would compile every @jit_fuser method with a C++ compiler.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_CudaNamesMeanCpu())
        for name, answer in {
            "current_device": lambda: torch.device("cpu"),
            "current_stream": lambda *_, **__: mock.MagicMock(name="cuda stream"),
            "synchronize": lambda *_, **__: None,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(
            mock.patch.multiple(
                megatron_random,
                _CUDA_RNG_STATE_TRACKER=_cpu_rng_tracker(),
                _CUDA_RNG_STATE_TRACKER_INITIALIZED=True,
            )
        )
        for module in _gated_delta_net_modules():
            # deterministic_mode replaces FLA's convolution and delta rule by torch, but not its l2norm.
            stack.enter_context(mock.patch.multiple(module, create=True, l2norm=_l2norm, HAVE_FLA=True))
        # Without Transformer Engine, the router of 0.16 reads this name, which is not defined.
        router = importlib.import_module("megatron.core.transformer.moe.moe_utils")
        if not hasattr(router, "te_general_gemm"):
            stack.enter_context(mock.patch.object(router, "te_general_gemm", None, create=True))
        yield


@contextlib.contextmanager
def model_parallel(
    *,
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    virtual: int | None = None,
    expert: int = 1,
    expert_tensor: int | None = None,
    seed: int = 1234,
) -> Iterator[None]:
    """Initialize and seed megatron-core's parallel state for the block. The process group must be initialized.

    Args:
        tensor, pipeline, context: tensor-parallel, pipeline-parallel and context-parallel size. The data-parallel size
            follows from them.
        virtual: model chunks on each pipeline rank; None if stages are not interleaved.
        expert: expert-parallel size.
        expert_tensor: tensor-parallel size of each expert; None for the size `tensor`.
        seed: seed of megatron-core's generators, like `--seed`.
    """
    for name, size in (("tensor", tensor), ("pipeline", pipeline), ("context", context), ("expert", expert)):
        check_count(name, size)
    for name, optional in (("virtual", virtual), ("expert_tensor", expert_tensor)):
        if optional is not None:
            check_count(name, optional)
    from megatron_fp32 import needs_megatron  # noqa: F401

    # isort: split
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    outside = set(distributed_c10d._world.pg_map)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=context,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
    )
    try:
        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        _drop_global_buffer(parallel_state)
        # destroy_model_parallel forgets its groups without ending them. Every gloo group has threads, so a pool of
        # ranks that comes here often would have thousands of threads.
        for group in [g for g in distributed_c10d._world.pg_map if g not in outside]:
            dist.destroy_process_group(group)


@contextlib.contextmanager
def single_process(backend: str = "gloo") -> Iterator[None]:
    """A process group with only this process, for tests in the main process."""
    check_choice("backend", backend, ("gloo", "nccl"))
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _drop_global_buffer(parallel_state: Any) -> None:
    # initialize_model_parallel asserts that there is no buffer, but destroy_model_parallel of some versions leaves one.
    if getattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", None) is not None:
        parallel_state.destroy_global_memory_buffer()


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Makes `device="cuda"` and `Tensor.cuda()` mean the CPU, and gives CPU tensors the `'torch.cuda.*'` type names
    that the optimizers dispatch on."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            name = func(*args)
            return name.replace("torch.", "torch.cuda.", 1) if not name.startswith("torch.cuda.") else name
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _cpu_rng_tracker() -> Any:
    from megatron.core.tensor_parallel import random as megatron_random

    class CpuRngStatesTracker(megatron_random.CudaRNGStatesTracker):
        """The tracker for the CPU generator. Each rank draws from its seeds, as on a GPU."""

        def add(self, name: str, seed: int) -> None:
            self._is_initialized = True
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"the rng state {name!r} or the seed {seed} exists already")
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            if name not in self.states_:
                raise ValueError(f"there is no rng state {name!r}; there are {sorted(self.states_)}")
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    return CpuRngStatesTracker()


def _gated_delta_net_modules() -> list[Any]:
    """The module `gated_delta_net` of megatron-core <= 0.18, or the package of >= 0.19 and two modules in it."""
    package = importlib.import_module("megatron.core.ssm.gated_delta_net")
    if not hasattr(package, "__path__"):
        return [package]
    return [package, *(importlib.import_module(f"{package.__name__}.{name}") for name in ("common", "gdn"))]


def _l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """`fla.modules.l2norm.l2norm`: `x * rsqrt(sum(x^2) + eps)`, computed in fp32 and cast to the input's dtype."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) + eps)).to(output_dtype or x.dtype)
