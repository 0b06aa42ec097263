"""slime's `calculate_log_probs_and_entropy`.

    from megatron_fp32.integrations.slime import calculate_log_probs_and_entropy

in place of `from slime.utils.ppo_utils import ...`, in slime/backends/megatron_utils/loss.py. Its
`get_log_probs_and_entropy`, which shifts the tokens and cuts the responses, stays as it is and calls this function.

Signature of slime/utils/ppo_utils.py, slime main at 624b824a8 (2026-08-21, after v0.3.1).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.integrations.tokens import stored_entropy, stored_logprobs, world_if_none
from megatron_fp32.validation import check_flag


def calculate_log_probs_and_entropy(
    logits: Tensor,
    tokens: Tensor,
    tp_group: dist.ProcessGroup | None,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs float32 [tokens, 1] of the labels, and the entropy float32 [tokens], or None where it is not wanted.

    As slime's function. Without tokens the log-probs have the shape [0]. Differences: a backward pass may run twice; no
    fp32 copy of the logits is kept for it; labels of -100 give 0. A label that is neither in the vocabulary nor -100
    gives NaN, where slime returns another number.

    Args:
        logits: [tokens, vocab / tp], bfloat16, float16 or float32, of the next tokens, divided by the temperature. They
            are not changed.
        tokens: [tokens], the labels: the next tokens.
        tp_group: the tensor-parallel ranks. None for all ranks where torch.distributed is initialized, as in slime.
        with_entropy: also return the entropy.
        chunk_size: tokens at a time; the operator chooses where it is not positive.
        log_prob_keep_mask: [tokens, vocab / tp] bool. The log-prob is of the softmax over the columns where it is True
            and the label; the entropy is of all columns. It costs a copy of the logits. Gradients of 16-bit logits are
            rounded before the entropy's and the log-prob's are added.
        with_entropy_grad: the entropy has a gradient.

    Raises:
        TypeError, ValueError: as `logprobs_from_logits`; and for a mask of another shape or dtype.
    """
    check_flag("with_entropy", with_entropy)
    check_flag("with_entropy_grad", with_entropy_grad)
    group = world_if_none(tp_group)
    size = chunk_size if chunk_size > 0 else None
    masked = logits
    if log_prob_keep_mask is not None:
        masked = _masked(logits, tokens, log_prob_keep_mask, group)
    logprobs, entropy = stored_logprobs(masked, tokens, group=group, chunk_size=size)
    if with_entropy and log_prob_keep_mask is not None:
        entropy = stored_entropy(logits, group=group, chunk_size=size)
    if not with_entropy_grad:
        entropy = entropy.detach()
    return logprobs.unsqueeze(-1) if len(tokens) else logprobs, entropy if with_entropy else None


def _masked(logits: Tensor, tokens: Tensor, keep: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """A copy of the logits, -inf where they are neither to be kept nor a label's."""
    if keep.dtype != torch.bool or keep.shape != logits.shape:
        raise ValueError(
            f"expected a log_prob_keep_mask of torch.bool and the logits' shape {tuple(logits.shape)}, "
            f"got {keep.dtype} and {tuple(keep.shape)}"
        )
    columns = logits.shape[-1]
    local = tokens - (0 if group is None else dist.get_rank(group) * columns)
    own = (local >= 0) & (local < columns)
    place = torch.where(own, local, 0)[:, None].long()
    keep = keep.scatter(1, place, keep.gather(1, place) | own[:, None])
    return torch.where(keep, logits, -torch.inf)
