"""The arguments that the operators of this folder share, checked and put in order."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logprobs.softmax import LogitsTransform, Mean, Softmax
from megatron_fp32.ops.products.fixed_order import check_fixed_order
from megatron_fp32.ops.products.grad_precision import PIECES, GradPrecision, check_grad_precision
from megatron_fp32.ops.products.operands import check_bias, check_operands, check_plain, check_shapes, piece_dtype
from megatron_fp32.ops.products.ranks import gather_first_dim
from megatron_fp32.ops.products.shard import BLOCK, VocabParallel, shard_of
from megatron_fp32.ops.traced import is_traced
from megatron_fp32.validation import check_choice, check_count, check_finite, check_flag

Backward = Literal["recompute", "saved"]
"""Where the backward pass finds the logits: it multiplies again, or they were kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorOptions:
    """What the operators of this folder compute and how, from arguments that `operator_options` has checked."""

    softmax: Softmax
    """Over the vocabulary, with this rank's columns."""
    sequence_parallel: bool
    """Gather `hidden` and scatter its gradient; False on one rank."""
    reduce_hidden_grad: bool
    """Sum the gradient of `hidden` over the ranks; False on one rank, and with `sequence_parallel`."""
    pieces: int
    """How many 16-bit tensors stand for dY."""
    keep_logits: bool
    """For the backward pass."""
    chunk_size: int | None
    """Tokens at a time; None chooses by the free memory."""
    mean: Mean
    """What to average over the vocabulary."""
    top_k: int
    """How many of the most probable tokens to find."""
    correct: bool
    """Tell whether the label is the most probable token."""

    def pieces_of(self, hidden: Tensor, weight: Tensor) -> int:
        """How many tensors stand for dY beside these operands: two float32 ones need no pieces."""
        return self.pieces if piece_dtype(hidden.dtype, weight.dtype) != torch.float32 else 1


def operator_options(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_parallel: VocabParallel | None,
    logits_transform: LogitsTransform | None,
    ignore_index: int,
    grad_precision: GradPrecision,
    invariant: bool,
    chunk_size: int | None,
    backward: Backward = "recompute",
    mean: Mean = "none",
    top_k: int = 0,
    correct: bool = False,
    bias: Tensor | None = None,
) -> OperatorOptions:
    """Check the arguments that the operators of this folder share. Raises what they list."""
    parallel = VocabParallel() if vocab_parallel is None else vocab_parallel
    transform = LogitsTransform() if logits_transform is None else logits_transform
    if not isinstance(parallel, VocabParallel):
        raise TypeError(f"vocab_parallel must be a VocabParallel or None, got {vocab_parallel!r}")
    if not isinstance(transform, LogitsTransform):
        raise TypeError(f"logits_transform must be a LogitsTransform or None, got {logits_transform!r}")
    check_grad_precision(grad_precision)
    check_choice("backward", backward, get_args(Backward))
    check_flag("invariant", invariant)
    check_shapes(hidden, weight)
    check_operands(hidden, weight, names=("hidden", "weight"))
    check_bias(bias, weight)
    check_plain(labels=labels)
    check_count("ignore_index", ignore_index, least=-(2**63))
    check_count("top_k", top_k, least=0)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    # Before anything that one rank may refuse and another not.
    shard = shard_of(weight, parallel)
    several = shard.group is not None
    _check_labels(hidden, labels, gathered=shard.ranks if parallel.sequence_parallel else 1)
    if top_k > shard.vocab_size:
        raise ValueError(f"top_k must be 0 to {shard.vocab_size}, the size of the vocabulary, got {top_k}")
    if invariant:
        _check_invariant(hidden, weight, shard.ranks, grad_precision)
    return OperatorOptions(
        softmax=Softmax(shard=shard, transform=transform, ignore_index=ignore_index, invariant=invariant),
        sequence_parallel=parallel.sequence_parallel and several,
        reduce_hidden_grad=parallel.reduce_hidden_grad and several and not parallel.sequence_parallel,
        pieces=PIECES[grad_precision],
        keep_logits=backward == "saved",
        chunk_size=chunk_size,
        mean=mean,
        top_k=top_k,
        correct=correct,
    )


def _check_labels(hidden: Tensor, labels: Tensor, *, gathered: int) -> None:
    expected = (hidden.shape[0] * gathered, *hidden.shape[1:-1])
    if tuple(labels.shape) != expected:
        raise ValueError(f"expected labels {expected}, got {tuple(labels.shape)}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")


def _check_invariant(hidden: Tensor, weight: Tensor, ranks: int, grad_precision: GradPrecision) -> None:
    if not is_traced(weight):
        # A compiler does not know addresses; the custom operator checks them when it runs.
        check_fixed_order(hidden, weight)
    if ranks > 1 and weight.shape[0] % BLOCK != 0:
        raise ValueError(
            "invariant=True sums over blocks of 128 tokens of the vocabulary, which must not cross ranks: expected a "
            f"multiple of 128 rows of the weight on every rank, got {weight.shape[0]}"
        )
    if weight.dtype == torch.float16 and grad_precision != "bf16" and hidden.requires_grad:
        raise ValueError(
            "invariant=True cannot be kept here: float16 pieces of dY share one scale, which depends on the batch; "
            f"expected grad_precision='bf16' for float16, got {grad_precision!r}"
        )


def positions_of(
    hidden: Tensor, mask: Tensor | None, vocab_parallel: VocabParallel | None, ignore_index: int
) -> Tensor:
    """[...] int64, in the leading shape of all ranks' `hidden`: `ignore_index` where `mask` is False.

    Raises:
        TypeError: for a mask that is not a plain tensor of bool.
        ValueError: for a mask of another shape.
    """
    sharded = isinstance(vocab_parallel, VocabParallel) and vocab_parallel.sequence_parallel
    group = vocab_parallel.group if sharded and vocab_parallel is not None else None
    ranks = 1 if group is None else dist.get_world_size(group)
    shape = (hidden.shape[0] * ranks, *hidden.shape[1:-1])
    if mask is None:
        return torch.full(shape, ignore_index + 1, dtype=torch.int64, device=hidden.device)
    check_plain(mask=mask)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor or None, got {getattr(mask, 'dtype', type(mask))}")
    if mask.shape != shape:
        raise ValueError(f"expected a mask {shape}, got {tuple(mask.shape)}")
    return torch.where(mask, ignore_index + 1, ignore_index)


def inverse_temperature_of(temperature: float | Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """[tokens] float32, 1 / temperature; 1 for ignored labels, and NaN where an element of a tensor is not positive.

    Raises:
        TypeError: for another type, or a tensor that is not of real numbers.
        ValueError: for a number that is not positive, or a tensor that requires a gradient or whose shape does not
            broadcast to the labels'.
    """
    if isinstance(temperature, Tensor):
        _check_temperatures(temperature, labels)
        each = _on_device_of(labels, temperature)
        if each.dtype != torch.float64:
            each = each.float()
        inverse = each.reciprocal().float()
        inverse = torch.where((each > 0) & each.isfinite() & inverse.isfinite(), inverse, torch.nan)
        return torch.where(labels == ignore_index, 1.0, inverse).reshape(-1)
    check_finite("temperature", temperature, positive=True)
    if temperature < torch.finfo(torch.float32).tiny:
        raise ValueError(f"temperature must be at least 2^-126, got {temperature}")
    return torch.full((labels.numel(),), 1 / temperature, dtype=torch.float32, device=labels.device)


def _check_temperatures(temperature: Tensor, labels: Tensor) -> None:
    check_plain(temperature=temperature)
    if temperature.dtype == torch.bool or temperature.is_complex():
        raise TypeError(f"temperature must be a tensor of real numbers, got {temperature.dtype}")
    wide = (1,) * (labels.dim() - temperature.dim()) + tuple(temperature.shape)
    fits = len(wide) == labels.dim() and all(a in (1, b) for a, b in zip(wide, labels.shape, strict=True))
    if not fits or temperature.requires_grad:
        raise ValueError(
            "expected a temperature without gradient, of a shape that broadcasts to the labels' shape "
            f"{tuple(labels.shape)}, got {tuple(temperature.shape)}, requires_grad={temperature.requires_grad}"
        )


def _on_device_of(labels: Tensor, temperature: Tensor) -> Tensor:
    """Without making the host wait where the host knows the only number."""
    if temperature.device == labels.device or temperature.is_cuda or temperature.numel() != 1:
        return temperature.to(labels.device)
    dtype = torch.float64 if temperature.dtype == torch.float64 else torch.float32
    return torch.full(temperature.shape, temperature.item(), dtype=dtype, device=labels.device)


def whole_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, options: OperatorOptions) -> Tensor:
    """[tokens, hidden] of all ranks, for labels [tokens].

    Where all tokens share a scale, the hidden states of tokens whose label is ignored are replaced by zeros.
    """
    if options.sequence_parallel:
        hidden = gather_first_dim(hidden, options.softmax.shard.group)
    whole = hidden.reshape(-1, hidden.shape[-1])
    if weight.dtype == torch.float16 and whole.dtype == torch.float32:
        return rows_where(labels != options.softmax.ignore_index, whole)
    return whole


def rows_where(chosen: Tensor, rows: Tensor) -> Tensor:
    """A copy of `rows` [tokens, ...] with zeros for the tokens that are not `chosen` [tokens], whatever they hold."""
    return torch.where(chosen[:, None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
