"""verl's functions for token log-probs and entropy.

| in place of | in |
|---|---|
| `verl.utils.megatron.tensor_parallel`: `vocab_parallel_entropy`, `vocab_parallel_entropy_with_chunking`, `vocab_parallel_log_probs_from_logits` | verl/workers/engine/megatron/transformer_impl.py |
| `verl.utils.torch_functional`: `logprobs_from_logits`, `entropy_from_logits`, `entropy_from_logits_with_chunking` | verl/workers/engine/{fsdp,automodel,torchtitan,veomni}/transformer_impl.py |
| `verl.utils.kernel.linear_cross_entropy`: `linear_cross_entropy` | verl/models/mcore/model_forward_fused.py, verl/models/transformers |
| `verl.utils.experimental.torch_functional`: `FusedLinearForPPO` | verl/models/transformers |

Signatures of these four files, verl main at 1dda039b9 (2026-08-22, after v0.9.0).

Differences that all of them have: results are float32, where verl returns some in the dtype of the logits; labels of
-100 give a log-prob of 0. A label that is neither in the vocabulary nor -100 gives NaN.
"""  # noqa: E501

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.integrations.tokens import hidden_logprobs, stored_entropy, stored_logprobs
from megatron_fp32.ops.logprobs import VocabParallel
from megatron_fp32.ops.logprobs.stored_rows import StoredRows
from megatron_fp32.validation import check_choice, check_count, check_flag


def _tensor_parallel_group() -> dist.ProcessGroup:
    """Megatron's, which verl's functions ask for themselves."""
    from megatron_fp32 import needs_megatron  # noqa: F401

    # isort: split
    from megatron.core import parallel_state

    return parallel_state.get_tensor_model_parallel_group()


def vocab_parallel_entropy(vocab_parallel_logits: Tensor) -> Tensor:
    """The entropy, float32 [...], of logits [..., vocab / tp] over Megatron's tensor-parallel ranks.

    verl's backward pass subtracts from the logits in place and adds to them again, which changes their last bits. Here
    the logits are not changed, so they need not be cloned before.

    Raises:
        TypeError, ValueError: as `logprobs_from_logits`.
    """
    return stored_entropy(vocab_parallel_logits, group=_tensor_parallel_group())


def vocab_parallel_entropy_with_chunking(vocab_parallel_logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """As `vocab_parallel_entropy`, `chunk_size` places of dimension 1 at a time.

    verl's function takes logits of three dimensions only, although it says otherwise. Of logits [tokens, vocab / tp],
    this one takes `chunk_size` tokens at a time.

    Raises:
        TypeError, ValueError: as `logprobs_from_logits`; and for a `chunk_size` below 1.
    """
    check_count("chunk_size", chunk_size)
    beside = vocab_parallel_logits.shape[0] if vocab_parallel_logits.dim() > 2 else 1
    size = max(1, chunk_size * beside)
    return stored_entropy(vocab_parallel_logits, group=_tensor_parallel_group(), chunk_size=size)


def vocab_parallel_log_probs_from_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs of the labels, float32 [...], over Megatron's tensor-parallel ranks.

    verl calls Megatron's cross entropy, whose forward pass destroys fp32 logits. Here they are not changed.

    Args:
        logits: [..., vocab / tp], bfloat16, float16 or float32.
        labels: [...].

    Raises:
        TypeError, ValueError: as `logprobs_from_logits`.
    """
    return stored_logprobs(logits, labels, group=_tensor_parallel_group())[0]


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probs of the labels, float32 [...], in one process.

    Args:
        logits: [..., vocab], bfloat16, float16 or float32.
        labels: [...].
        inplace_backward: the backward pass may write the gradient over the logits. verl's does with flash-attn. This
            one does where the logits are not a leaf and their rows are dense in memory; elsewhere the gradient is a new
            tensor. An operator whose backward pass reads the logits later raises RuntimeError: pass False there, as
            verl's workers do where they want the entropy.

    Raises:
        TypeError, ValueError: as `megatron_fp32.ops.logprobs.logprobs_from_logits`.
    """
    check_flag("inplace_backward", inplace_backward)
    may = inplace_backward and not logits.is_leaf and StoredRows(logits).writable
    return stored_logprobs(logits, labels, group=None, inplace_backward=may)[0]


def entropy_from_logits(logits: Tensor) -> Tensor:
    """The entropy, float32 [...], of logits [..., vocab] in one process.

    verl computes it in the logits' dtype.

    Raises:
        TypeError, ValueError: as `megatron_fp32.ops.logprobs.logprobs_from_logits`.
    """
    return stored_entropy(logits, group=None)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """As `entropy_from_logits`, `chunk_size` places of dimension 0 at a time.

    verl's function takes logits of two dimensions only, and autograd keeps an fp32 copy of all of them.

    Raises:
        TypeError, ValueError: as `entropy_from_logits`; and for a `chunk_size` below 1.
    """
    check_count("chunk_size", chunk_size)
    return stored_entropy(logits, group=None, chunk_size=max(1, chunk_size * math.prod(logits.shape[1:-1])))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probs (not losses, in spite of the name) and entropy from hidden states, both float32.

    The log-probs are [tokens], whatever the shape of the labels is, or a number with a reduction. The entropy is
    [tokens]. As in verl, the gradient of `hidden` is not summed over the ranks: the caller's
    `gather_from_sequence_parallel_region` does that. The weight may have a `main_grad` (see `fp32_logits`).

    verl's kernels need CUDA and a hidden size that is a multiple of 128, sum dX in 16 bits over parts of the
    vocabulary, and fail where all logits are below -87. Here none of this is so.

    Args:
        hidden: [..., hidden].
        weight: [vocab / tp, hidden].
        labels: [...], as many as there are rows in `hidden`.
        temperature: divides the logits; or a tensor of one for every token, in the shape of the labels.
        reduction: `"none"`, or `"sum"` or `"mean"` of the log-probs over all tokens, also those with a label of -100.
        dist_process_group: the tensor-parallel ranks; None for one process.

    Raises:
        TypeError, ValueError: as `linear_logprobs`; and for another reduction.
    """
    if isinstance(reduction, str):
        reduction = reduction.lower()
    check_choice("reduction", reduction, ("none", "sum", "mean"))
    if temperature is None:
        raise TypeError("temperature must be a number, got None")
    each = temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature
    logprobs, entropy = hidden_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=each,
        vocab_parallel=VocabParallel(group=dist_process_group, reduce_hidden_grad=False),
    )
    if reduction == "sum":
        logprobs = logprobs.sum()
    elif reduction == "mean":
        logprobs = logprobs.mean()
    return logprobs, entropy


class FusedLinearForPPO(torch.nn.Module):
    """A module without parameters: log-probs and entropy from hidden states, in one process.

    verl rounds the logits and the entropy to the dtype of the hidden states, and sums dW over the chunks in it. Here
    the logits are never rounded, and the entropy is float32.

    Args:
        chunk_size: tokens at a time.

    Raises:
        TypeError, ValueError: on construction, for a `chunk_size` that is not an int, or below 1.
    """

    def __init__(self, chunk_size: int = 512) -> None:
        super().__init__()
        check_count("chunk_size", chunk_size)
        self.chunk_size = chunk_size

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy, float32 and in the shape of the labels.

        Args:
            hidden_states: [tokens, hidden] or [batch, tokens, hidden].
            vocab_weights: [vocab, hidden].
            input_ids: [tokens] or [batch, tokens], the labels: the caller has shifted them.
            temperature: divides the logits; or a tensor of one for every token.
        """
        return hidden_logprobs(
            hidden_states,
            vocab_weights,
            input_ids.long(),
            temperature=temperature,
            vocab_parallel=VocabParallel(),
            chunk_size=self.chunk_size,
        )
