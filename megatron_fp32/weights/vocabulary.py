"""Rows of a Megatron checkpoint's embedding and head above the vocabulary: padding, or trained tokens.

A trainer makes these tensors larger than the vocabulary, so that every rank gets as many rows. megatron-core fills the
rows that a checkpoint does not have with zeros when it loads one (dist_checkpointing/strategies/torch.py,
`allow_shape_mismatch`), so after an import they are zeros. No input refers to a padding row of the embedding, so it
stays zero. The softmax over the padded vocabulary trains the padding rows of the head (of a tied embedding too), but
all of them alike, because they begin alike: they stay equal to each other, bit for bit. Everything else is taken for
tokens that were added. Rows of tokens that were added and are all equal cannot be told from padding; an export lists
both.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.hf_config.text import text_part

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
    alike: bool
    """All rows above the vocabulary, two or more, are finite and equal bit for bit."""


def nonzero_rows(above: Tensor, vocab_size: int) -> CutRows | None:
    """The rows above the vocabulary that are not zero; None where all are zero.

    Args:
        above: rows of embedding or head from `vocab_size` on, [rows, hidden].
        vocab_size: rows that belong to the vocabulary.
    """
    (found,) = (above.double() != 0).any(dim=1).nonzero(as_tuple=True)
    if not len(found):
        return None
    codes = above.contiguous().view(torch.uint8)
    alike = len(above) > 1 and torch.equal(codes, codes[:1].expand_as(codes)) and bool(above.isfinite().all())
    return CutRows(rows=len(found), end=vocab_size + int(found[-1]) + 1, alike=alike)


def is_padding(cut: Mapping[str, CutRows], *, tied: bool) -> bool:
    """Whether a softmax over the padded vocabulary explains rows above it; true where there are none.

    Args:
        cut: `nonzero_rows` of the tensors of one checkpoint that have any.
        tied: the embedding is the head.
    """
    embedding, head = PADDED_VOCABULARY
    with_softmax = embedding if tied else head
    return all(name == with_softmax and rows.alike for name, rows in cut.items())


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
    text = text_part(changed)
    for part in (changed, text):
        if part is not None and (part is text or "vocab_size" in part):
            part["vocab_size"] = vocab_size
    return changed
