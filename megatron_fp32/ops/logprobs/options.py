"""The arguments that the operators of this folder share, checked and put in order."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.config import GradPrecision, check_grad_precision
from megatron_fp32.ops.logits.autograd import PIECES
from megatron_fp32.ops.logits.fixed_order import check_fixed_order
from megatron_fp32.ops.logits.gemm import check_operands, check_plain
from megatron_fp32.ops.logits.ranks import gather_first_dim
from megatron_fp32.ops.logprobs.even import check_even_shards
from megatron_fp32.ops.logprobs.statistics import BLOCK, Mean, Shard
from megatron_fp32.validation import check_choice, check_count, check_finite, check_flag

Backward = Literal["recompute", "saved"]
"""Where the backward pass finds the logits: it multiplies again, or they were kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Arguments of the operators of this folder, checked and put in order by `head_options`."""

    shard: Shard
    sequence_parallel: bool
    reduce_hidden_grad: bool
    pieces: int
    keep_logits: bool
    chunk_size: int | None
    mean: Mean
    top_k: int


def head_options(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    tp_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    reduce_hidden_grad: bool,
    vocab_size: int | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    grad_precision: GradPrecision,
    invariant: bool,
    chunk_size: int | None,
    backward: Backward = "recompute",
    mean: Mean = "none",
    top_k: int = 0,
) -> HeadOptions:
    """Check the arguments that the operators of this folder share. Raises what they say."""
    check_grad_precision(grad_precision)
    check_choice("backward", backward, get_args(Backward))
    for name, flag in (
        ("sequence_parallel", sequence_parallel),
        ("reduce_hidden_grad", reduce_hidden_grad),
        ("invariant", invariant),
    ):
        check_flag(name, flag)
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "expected hidden [..., hidden] of 2 or more dimensions and weight [vocab, hidden], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    check_operands(hidden, weight, names=("hidden", "weight"))
    check_plain(labels=labels)
    if vocab_size is not None:
        check_count("vocab_size", vocab_size)
    check_count("ignore_index", ignore_index, least=-(2**63))
    group = tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None
    # Before anything that one rank may refuse and another not.
    check_even_shards(weight, group)
    ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
    first = hidden.shape[0] * (ranks if sequence_parallel else 1)
    if tuple(labels.shape) != (first, *hidden.shape[1:-1]):
        raise ValueError(f"expected labels {(first, *hidden.shape[1:-1])}, got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    columns = weight.shape[0]
    if vocab_size is not None and not 0 < vocab_size <= columns * ranks:
        raise ValueError(f"vocab_size must be 1 to {columns * ranks}, the rows of the weight, got {vocab_size}")
    if 0 <= ignore_index < (vocab_size or columns * ranks):
        raise ValueError(f"ignore_index must not be a token of the vocabulary, got {ignore_index}")
    if softcap is not None:
        check_finite("softcap", softcap, positive=True)
    check_finite("scale", scale)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    if invariant:
        _check_invariant(hidden, weight, ranks)
        if weight.dtype == torch.float16 and grad_precision != "bf16" and hidden.requires_grad:
            raise ValueError(
                "invariant=True cannot be kept here: float16 pieces of dY share one scale, which depends on the batch; "
                f"expected grad_precision='bf16' for float16, got {grad_precision!r}"
            )
    first_column = rank * columns
    total = columns * ranks if vocab_size is None else vocab_size
    check_count("top_k", top_k, least=0)
    if top_k > total:
        raise ValueError(f"top_k must be 0 to {total}, the size of the vocabulary, got {top_k}")
    shard = Shard(
        group=group,
        first_column=first_column,
        valid_columns=min(max(total - first_column, 0), columns),
        vocab_size=total,
        scale=scale,
        softcap=softcap,
        ignore_index=ignore_index,
        invariant=invariant,
    )
    return HeadOptions(
        shard=shard,
        sequence_parallel=sequence_parallel and group is not None,
        reduce_hidden_grad=reduce_hidden_grad and group is not None and not sequence_parallel,
        pieces=PIECES[grad_precision],
        keep_logits=backward == "saved",
        chunk_size=chunk_size,
        mean=mean,
        top_k=top_k,
    )


def _check_invariant(hidden: Tensor, weight: Tensor, ranks: int) -> None:
    check_fixed_order(hidden, weight)
    if ranks > 1 and weight.shape[0] % BLOCK != 0:
        raise ValueError(
            "invariant=True sums over blocks of 128 tokens of the vocabulary, which must not cross ranks: expected a "
            f"multiple of 128 rows of the weight on every rank, got {weight.shape[0]}"
        )


def inverse_temperature(temperature: float | Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """[tokens] float32, 1 / temperature; 1 for ignored labels, and NaN where one of several is not positive.

    Raises:
        ValueError: for a number that is not positive, or a tensor in another shape than the labels' or that requires a
            gradient.
    """
    if isinstance(temperature, Tensor):
        if temperature.shape != labels.shape or temperature.requires_grad:
            raise ValueError(
                f"expected a temperature without gradient and of the labels' shape {tuple(labels.shape)}, got "
                f"{tuple(temperature.shape)}, requires_grad={temperature.requires_grad}"
            )
        check_plain(temperature=temperature)
        each = temperature.to(labels.device, torch.float32)
        each = torch.where((each > 0) & each.isfinite(), each.reciprocal(), torch.nan)
        return torch.where(labels == ignore_index, 1.0, each).reshape(-1)
    check_finite("temperature", temperature, positive=True)
    if temperature < torch.finfo(torch.float32).tiny:
        raise ValueError(f"temperature must be at least 2^-126, got {temperature}")
    return torch.full((labels.numel(),), 1 / temperature, dtype=torch.float32, device=labels.device)


def whole_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, options: HeadOptions) -> Tensor:
    """[tokens, hidden] of all ranks, for labels [tokens].

    Where all tokens share a scale, those whose label is ignored are zeros.
    """
    if options.sequence_parallel:
        hidden = gather_first_dim(hidden, options.shard.group)
    whole = hidden.reshape(-1, hidden.shape[-1])
    if weight.dtype == torch.float16 and whole.dtype == torch.float32:
        return rows_where(labels != options.shard.ignore_index, whole)
    return whole


def rows_where(chosen: Tensor, rows: Tensor) -> Tensor:
    """A copy of `rows` [tokens, ...] with zeros for the tokens that are not `chosen` [tokens], whatever they hold."""
    return torch.where(chosen[:, None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
