"""What tests of all folders share: ranks, poisoned memory, small models, the command line."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner, Result

from megatron_fp32 import cli
from megatron_fp32.config import Fp32Config
from megatron_fp32.testing.cpu import cpu_megatron
from tests.qwen3_5 import tiny_qwen3_5

STOCK = Fp32Config(logits=False, gated_delta_net=())


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` is full of NaN inside the block, so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def rank_setup() -> Iterator[None]:
    """What every rank of the pools in conftest.py enters."""
    with cpu_megatron(), poisoned_memory():
        yield


def stock_model(*, model: dict[str, Any] | None = None, stage: dict[str, Any] | None = None, **overrides: Any) -> Any:
    """megatron-core's own GPTModel with its own layers, in bf16.

    Args:
        model: fields of `tiny_qwen3_5`.
        stage: arguments of `build_model`, such as `post_process`.
        overrides: fields of `TransformerConfig`.
    """
    from megatron_fp32.models.provider import build_model, cpu_overrides, transformer_config

    shapes = tiny_qwen3_5(**(model or {}))
    config = transformer_config(
        shapes, **{"bf16": True, "params_dtype": torch.bfloat16, **cpu_overrides(), **overrides}
    )
    return build_model(shapes, config, STOCK, vocab_divisible_by=8, **(stage or {}))


def full_mantissa(*shape: int, seed: int = 0, scale: float = 0.5) -> torch.Tensor:
    """fp32 values that bf16 cannot hold, half of them below `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator).mul_(0.5).exp_()


def run_command(*args: str | Path) -> Result:
    """Run a command of `megatron-fp32` in this process."""
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


def refused(*args: str | Path, status: int = 1) -> str:
    """What a command that must refuse says on stderr."""
    result = run_command(*args)
    assert isinstance(result.exception, SystemExit), result.exc_info
    assert (result.exit_code, result.stdout) == (status, "")
    return result.stderr


def in_a_child(function: Callable[..., Any], *args: Any, memory: int) -> Any:
    """What a function returns in a forked process that may take so many more bytes of address space.

    A fork takes a hundredth of the time of a process that imports torch. The result must fit JSON.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            with os.fdopen(write, "w") as pipe:
                json.dump(function(*args), pipe)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    assert status == 0, f"it ended with {os.waitstatus_to_exitcode(status)}"
    return json.loads(answer)
