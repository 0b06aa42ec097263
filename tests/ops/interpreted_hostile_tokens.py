"""Run in Triton's interpreter: the checks of `hostile_tokens.py`, on whole operators with the kernels that a GPU runs.

The operators choose their definitions in torch on the CPU; here the kernels stand in for these.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs import gradient, kernels, statistics, tokens, weighted
from megatron_fp32.ops.logprobs.softmax import FIELDS
from megatron_fp32.ops.products import invariant_hidden_grad
from megatron_fp32.ops.products.fixed_order import aligned, why_not_fixed_order
from megatron_fp32.ops.products.hidden_grad_triton import add_hidden_grad
from megatron_fp32.ops.products.project_triton import project_triton
from megatron_fp32.ops.products.shard import BLOCK
from tests.ops.hostile_tokens import CHECKS, Head


def block_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inverse_temperature: Tensor,
    softmax: Any,
    *,
    mean: Any,
    keep: Any,
    bias: Any = None,
) -> tuple[Tensor, Tensor]:
    """What `statistics.block_statistics` does on a GPU with the fused product."""
    if why_not_fixed_order(hidden, weight) is not None or bias is not None:
        return statistics.block_statistics(
            hidden, weight, labels, inverse_temperature, softmax, mean=mean, keep=keep, bias=bias
        )
    blocks = -(-weight.shape[0] // BLOCK)
    found = torch.full((blocks, FIELDS[mean], hidden.shape[0]), 7.0)
    label_logits = torch.zeros(hidden.shape[0])
    project_triton(
        aligned(hidden), weight, logits=None if keep is None else keep.values, statistics=found, labels=labels,
        label_logits=label_logits, inverse_temperature=inverse_temperature, valid_columns=softmax.shard.valid_columns,
        scale=softmax.transform.scale, softcap=softmax.transform.softcap,
    )  # fmt: skip
    statistics._keep_tops(keep, found, labels, label_logits)
    return found, label_logits


def can_keep_exponentials(hidden: Tensor, weight: Tensor, options: Any) -> bool:
    enough = options.pieces == 1 and options.softmax.transform.softcap is None
    return enough and hidden.dtype == weight.dtype == torch.bfloat16


def exponentials_gradient(kept: Any, vectors: Tensor, labels: Tensor, softmax: Any) -> Tensor:
    return kernels.exponentials_gradient_triton(kept.values, kept.tops, vectors, labels, softmax)


@contextlib.contextmanager
def kernels_everywhere() -> Iterator[None]:
    """Kernels instead of their definitions."""
    with (
        mock.patch.object(tokens, "block_statistics", block_statistics),
        mock.patch.object(tokens, "_fixed_chunks", lambda count: [slice(0, count)]),
        mock.patch.object(tokens, "ROWS", 1),
        mock.patch.object(statistics, "statistics_torch", kernels.statistics_triton),
        mock.patch.object(statistics, "combine_torch", kernels.combine_triton),
        mock.patch.object(statistics, "finish_torch", kernels.finish_triton),
        mock.patch.object(gradient, "gradient_torch", kernels.gradient_triton),
        mock.patch.object(weighted, "_can_keep_exponentials", can_keep_exponentials),
        mock.patch.object(weighted, "exponentials_gradient", exponentials_gradient),
        mock.patch.object(invariant_hidden_grad, "_add_on_cpu", add_hidden_grad),
    ):
        yield


CHOSEN = [
    Head(operator="logprobs"),
    Head(operator="entropy", options={"invariant": True, "grad_precision": "bf16x2"}),
    Head(operator="loss", dtype=torch.float32, options={"label_smoothing": 0.1}),
    Head(operator="weighted", options={"label_smoothing": 0.1, "z_loss": 1e-3}),
    Head(operator="weighted", dtype=torch.float16, options={"grad_precision": "bf16x3", "softcap": 5.0}),
    Head(operator="weighted", biased=True, options={"label_smoothing": 0.1}),
    Head(operator="logprobs", wide_weight=True, biased=True, options={"grad_precision": "bf16x2"}),
]
"""Every kernel, and every branch in one."""


def run(check: Callable[[Head], None], head: Head) -> None:
    with kernels_everywhere():
        check(head)


CASES = {f"{check.__name__}-{head}": functools.partial(run, check, head) for head in CHOSEN for check in CHECKS}
