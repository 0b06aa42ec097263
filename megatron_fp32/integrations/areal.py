"""AReaL's `gather_logprobs` and `gather_logprobs_entropy`.

    from megatron_fp32.integrations.areal import gather_logprobs, gather_logprobs_entropy

in place of `from areal.utils.functional import ...`, in areal/engine/fsdp_engine.py, areal/engine/megatron_engine.py
and areal/experimental/engine/archon_engine.py.

Signatures of areal/utils/functional/vocab_parallel.py, AReaL main at cbff54d64 (2026-08-22).
"""

from __future__ import annotations

import math

import torch.distributed as dist
from torch import Tensor

from megatron_fp32.integrations.tokens import stored_logprobs
from megatron_fp32.ops.logprobs.stored_rows import StoredRows
from megatron_fp32.validation import check_count, check_flag


def gather_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int = 1024,
) -> Tensor:
    """Log-probs of the labels, float32 [...].

    As AReaL's function, and: a backward pass may run twice; no fp32 copy of the logits is kept for it; labels of -100
    give 0; an empty batch is no error. A label that is neither in the vocabulary nor -100 gives NaN, where AReaL raises
    an error on one rank, and returns another number on several.

    Args:
        logits: [..., vocab / tp], bfloat16, float16 or float32. They are not changed.
        labels: [...].
        temperature: divides the logits.
        tp_group: the tensor-parallel ranks; None for one process.
        chunk_size: how many places of the first dimension to work on at a time.

    Raises:
        TypeError, ValueError: as `logprobs_from_logits`; and for a `chunk_size` below 1.
    """
    tokens = _tokens(logits, chunk_size)
    return stored_logprobs(logits, labels, group=tp_group, temperature=temperature, chunk_size=tokens)[0]


def gather_logprobs_entropy(
    logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int = 1024,
    reuse_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of the labels, and the entropy, both float32 [...] and differentiable.

    As AReaL's function, with the differences of `gather_logprobs`. AReaL's entropy has no gradient with `reuse_logits`,
    and its forward pass destroys the logits then. Here the entropy always has a gradient, and the logits stay what they
    are until the backward pass.

    Args:
        logits: as for `gather_logprobs`.
        labels: as for `gather_logprobs`.
        temperature: as for `gather_logprobs`.
        tp_group: as for `gather_logprobs`.
        chunk_size: as for `gather_logprobs`.
        reuse_logits: the backward pass may write the gradient over the logits. It does so on any device, in any dtype,
            where the logits are not a leaf and their rows are dense in memory; elsewhere the gradient is a new tensor.

    Raises:
        As `gather_logprobs`.
    """
    check_flag("reuse_logits", reuse_logits)
    tokens = _tokens(logits, chunk_size)
    return stored_logprobs(
        logits,
        labels,
        group=tp_group,
        temperature=temperature,
        chunk_size=tokens,
        inplace_backward=reuse_logits and not logits.is_leaf and StoredRows(logits).writable,
    )


def _tokens(logits: Tensor, chunk_size: int) -> int:
    check_count("chunk_size", chunk_size)
    return max(1, chunk_size * math.prod(logits.shape[1:-1]))
