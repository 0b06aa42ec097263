"""Cross entropy of vocab-parallel logits that does not change the logits."""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
from typing import Any

from megatron.core.tensor_parallel import cross_entropy
from torch import Tensor


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """megatron-core's function of this name, applied to a copy of the logits.

    megatron-core's function works in place on `logits.float()`. That is a copy of bf16 logits, but fp32 logits are
    overwritten. The copy here takes 4 more bytes for each logit. If nothing reads the logits after the loss, use
    megatron-core's function instead.

    Args:
        logits: [s, b, vocab / tp].
        target: [s, b], ids in the whole vocabulary.
        *args, **kwargs: further arguments of megatron-core's function.

    Returns:
        [s, b] float32.
    """
    return cross_entropy.vocab_parallel_cross_entropy(logits.clone(), target, *args, **kwargs)
