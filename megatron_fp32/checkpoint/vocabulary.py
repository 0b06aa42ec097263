"""Rows of a Megatron checkpoint's embedding and head above the vocabulary: padding, or trained.

A trainer makes these tensors larger than the vocabulary, so that every rank gets as many rows. megatron-core fills the
rows that a checkpoint does not have with zeros when it loads one (dist_checkpointing/strategies/torch.py,
`allow_shape_mismatch`), so after an import they are zeros. Tokens that were added in training have other values there.
So may an output layer whose softmax runs over the padded vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from torch import Tensor

from megatron_fp32.checkpoint.huggingface import CheckpointError

PADDED_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
"""Megatron tensors whose rows a trainer pads."""


def check_vocab_size(value: object) -> None:
    """Raise ValueError unless it is None or a whole number of 1 or more."""
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"vocab_size must be None or a whole number of 1 or more, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutRows:
    """Rows above the vocabulary that hold values other than zero."""

    rows: int
    """How many they are."""
    end: int
    """The number of rows up to the last of them: a vocabulary of this size has all of them."""


def rows_above(tensor: Tensor, vocab_size: int) -> CutRows | None:
    """The rows from `vocab_size` on that are not zero; None where all are.

    Args:
        tensor: embedding or head, [rows, hidden].
        vocab_size: rows that belong to the vocabulary.
    """
    (found,) = (tensor[vocab_size:].double() != 0).any(dim=1).nonzero(as_tuple=True)
    if not len(found):
        return None
    return CutRows(rows=len(found), end=vocab_size + int(found[-1]) + 1)


def with_vocab_size(hf_config: dict[str, Any], vocab_size: int, source_size: int) -> dict[str, Any]:
    """A copy of a parsed `config.json` with another size of the vocabulary.

    Args:
        hf_config: of the source.
        vocab_size: the new size.
        source_size: the source's.

    Raises:
        CheckpointError: for a size below the source's.
    """
    if vocab_size < source_size:
        raise CheckpointError(
            f"vocab_size must be at least the source's {source_size} (config.json), got {vocab_size}: an export does "
            "not take tokens away"
        )
    changed = copy.deepcopy(hf_config)
    parts = (changed, changed.get("text_config"))
    text = parts[1] if isinstance(parts[1], dict) else changed
    for part in parts:
        if isinstance(part, dict) and (part is text or "vocab_size" in part):
            part["vocab_size"] = vocab_size
    return changed
