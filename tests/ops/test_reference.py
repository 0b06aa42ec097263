"""The yardstick itself, against float64 autograd; and that it can be read without Megatron."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from megatron_fp32.ops.logits.reference import gradients_reference, logits_reference, relative_error


@pytest.mark.parametrize("shape", [(4, 8), (3, 2, 8), (0, 2, 8)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_reference_is_float64_autograd(shape: tuple[int, ...], with_bias: bool) -> None:
    hidden, weight = torch.randn(shape).bfloat16(), torch.randn(6, 8).bfloat16()
    bias = torch.randn(6).bfloat16() if with_bias else None
    grad = torch.randn(*shape[:-1], 6)

    wide = [t.double().requires_grad_() for t in (hidden, weight, bias) if t is not None]
    logits = F.linear(*wide)
    expected = (logits, *torch.autograd.grad(logits, wide, grad.double()))
    actual = gradients_reference(hidden, weight, grad, bias)

    assert all(t.dtype == torch.float64 for t in actual)
    for mine, theirs in zip(actual, expected, strict=False):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(logits_reference(hidden, weight, bias), logits)
    torch.testing.assert_close(actual.bias_grad, grad.double().reshape(-1, 6).sum(0))


def test_relative_error() -> None:
    truth = torch.tensor([3.0, 4.0])
    assert relative_error(truth, truth) == 0
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0
    assert relative_error(torch.tensor([0.0, 2.0]), torch.zeros(2)) == 2
    # Differences that fp32 would swallow.
    assert relative_error(1 + torch.tensor([2.0**-40]).double(), torch.ones(1)) == 2.0**-40


def test_operators_checkpoints_and_families_work_without_megatron() -> None:
    program = """
import importlib, sys
sys.modules["megatron"] = None  # importing it raises
import megatron_fp32
for name in sys.argv[1:]:
    importlib.import_module(name)
for name in ("Fp32Config", "fp32_logits", "keep_in_fp32", "import_checkpoint", "export_checkpoint"):
    getattr(megatron_fp32, name)
assert not [name for name in sys.modules if name.startswith("megatron.")]
"""
    rooms = [
        "megatron_fp32.ops.logits.reference",
        "megatron_fp32.checkpoint.convert",
        "megatron_fp32.checkpoint.formats.huggingface",
        "megatron_fp32.checkpoint.formats.torch_dist",
        "megatron_fp32.weights.mapping",
        "megatron_fp32.weights.families.qwen3_5",
        "megatron_fp32.kept_parameters.keep_in_fp32",
        "megatron_fp32.testing.ranks",
        "megatron_fp32.cli",
    ]
    done = subprocess.run([sys.executable, "-c", program, *rooms], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
