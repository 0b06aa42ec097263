"""What the functions of all frameworks share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.ops.logprobs import VocabParallel, linear_logprobs, logprobs_from_logits

NO_LABEL = -100
"""A token with this label has a log-prob of 0, without a gradient. Its entropy is that of its logits."""

_ANOTHER = -1
"""A label that no vocabulary has, for tokens of which only the entropy is wanted."""


def world_if_none(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The group, or all ranks for None: what torch.distributed's own functions take None for. None for one process."""
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    return group


def stored_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    group: dist.ProcessGroup | None,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = None,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy, float32 and in the shape of the labels, of stored logits.

    Args:
        logits: [..., vocab / tp].
        labels: [...].
        group: the tensor-parallel ranks; None for one process.
        temperature: as for `logprobs_from_logits`.
        chunk_size: tokens at a time; None chooses.
        inplace_backward: as for `logprobs_from_logits`.
    """
    missing = labels == NO_LABEL
    out = logprobs_from_logits(
        logits,
        torch.where(missing, 0, labels),
        temperature=temperature,
        vocab_parallel=VocabParallel(group=group),
        chunk_size=chunk_size,
        inplace_backward=inplace_backward,
    )
    return torch.where(missing, 0.0, out.logprobs), out.entropy


def stored_entropy(logits: Tensor, *, group: dist.ProcessGroup | None, chunk_size: int | None = None) -> Tensor:
    """The entropy of every token, float32 [...], of stored logits [..., vocab / tp]."""
    labels = torch.full(logits.shape[:-1], _ANOTHER, dtype=torch.int64, device=logits.device)
    parallel = VocabParallel(group=group)
    return logprobs_from_logits(logits, labels, vocab_parallel=parallel, chunk_size=chunk_size).entropy


def hidden_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_parallel: VocabParallel,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropy, float32 and in the shape of the labels, from hidden states.

    Args:
        hidden: [..., hidden], as for `linear_logprobs`. The others likewise.
        weight: [vocab / tp, hidden].
        labels: [...].
        vocab_parallel: the ranks, and who sums the gradient of `hidden`.
        temperature: divides the logits.
        chunk_size: tokens at a time; None chooses.
    """
    missing = labels == NO_LABEL
    out = linear_logprobs(
        hidden,
        weight,
        torch.where(missing, 0, labels),
        temperature=temperature,
        vocab_parallel=vocab_parallel,
        chunk_size=chunk_size,
    )
    return torch.where(missing, 0.0, out.logprobs), out.entropy
