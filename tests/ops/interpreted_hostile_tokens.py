"""Run in Triton's interpreter: the checks of `hostile_tokens.py`, on whole operators with the kernels that a GPU runs.

The operators choose their definitions in torch on the CPU; here the kernels stand in for these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_fp32.ops.logits import invariant_grad
from megatron_fp32.ops.logits.fixed_order import aligned, why_not_fixed_order
from megatron_fp32.ops.logits.hidden_grad_triton import add_hidden_grad
from megatron_fp32.ops.logits.project_triton import project_triton
from megatron_fp32.ops.logprobs import gradient, kernels, statistics, tokens, weighted
from tests.ops.hostile_tokens import CHECKS, Head


def block_statistics(
    hidden: Tensor, weight: Tensor, labels: Tensor, heat: Tensor, shard: Any, *, mean: Any, keep: Any
) -> tuple[Tensor, Tensor]:
    """What `statistics.block_statistics` does on a GPU with the fused product."""
    if why_not_fixed_order(hidden, weight) is not None:
        return statistics.block_statistics(hidden, weight, labels, heat, shard, mean=mean, keep=keep)
    blocks = -(-weight.shape[0] // statistics.BLOCK)
    found = torch.full((blocks, statistics.FIELDS[mean], hidden.shape[0]), 7.0)
    label_logits = torch.zeros(hidden.shape[0])
    project_triton(
        aligned(hidden), weight, logits=None if keep is None else keep.values, statistics=found, labels=labels,
        label_logits=label_logits, inverse_temperature=heat, valid_columns=shard.valid_columns, scale=shard.scale,
        softcap=shard.softcap,
    )  # fmt: skip
    statistics._keep_tops(keep, found, labels, label_logits)
    return found, label_logits


def can_keep_exponentials(hidden: Tensor, weight: Tensor, options: Any) -> bool:
    return options.pieces == 1 and options.shard.softcap is None and hidden.dtype == weight.dtype == torch.bfloat16


def exponentials_gradient(kept: Any, vectors: Tensor, labels: Tensor, shard: Any) -> Tensor:
    return kernels.exponentials_gradient_triton(kept.values, kept.tops, vectors, labels, shard)


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
        mock.patch.object(invariant_grad, "_add_on_cpu", add_hidden_grad),
    ):
        yield


CHOSEN = [
    Head(operator="logprobs"),
    Head(operator="entropy", options={"invariant": True, "grad_precision": "bf16x2"}),
    Head(operator="loss", dtype=torch.float32, options={"label_smoothing": 0.1}),
    Head(operator="weighted", options={"label_smoothing": 0.1, "z_loss": 1e-3}),
    Head(operator="weighted", dtype=torch.float16, options={"grad_precision": "bf16x3", "softcap": 5.0}),
]
"""Every kernel, and every branch in one."""

if __name__ == "__main__":
    with kernels_everywhere():
        for head in CHOSEN:
            for check in CHECKS:
                try:
                    check(head)
                except AssertionError as error:
                    raise AssertionError(f"{check.__name__}: {head}: {error}") from error
    print("done")
