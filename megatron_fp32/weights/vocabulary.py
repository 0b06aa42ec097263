"""Rows of a Megatron checkpoint's embedding and head above the vocabulary: padding rows, or added tokens.

A trainer makes these tensors larger than the vocabulary, so that every rank gets as many rows. Padding rows can be
recognised by their values:

- When megatron-core loads a checkpoint, it fills missing rows with zeros (dist_checkpointing/strategies/torch.py,
  `allow_shape_mismatch`). So they are zeros after an import.
- Padding rows of an embedding stay zero, because no input refers to them.
- Padding rows of a head, or of a tied embedding, are trained by the softmax over the padded vocabulary. They begin
  equal and get equal gradients, so they stay equal to each other bit for bit.

All other rows are taken for tokens that were added. If the rows of added tokens are all equal, they look like padding.
An export reports rows of both kinds.
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
    """Raise ValueError unless `value` is None or a whole number of 1 or more."""
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(f"vocab_size must be None or a whole number of 1 or more, got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutRows:
    """Rows above the vocabulary that are not zero."""

    rows: int
    """The number of rows that are not zero."""
    end: int
    """The smallest vocabulary size that includes all of these rows."""
    alike: bool
    """There are two or more rows above the vocabulary, all finite and equal bit for bit."""


def nonzero_rows(above: Tensor, vocab_size: int) -> CutRows | None:
    """The rows above the vocabulary that are not zero; None if all are zero.

    Args:
        above: rows of embedding or head from `vocab_size` on, [rows, hidden].
        vocab_size: the number of rows that belong to the vocabulary.
    """
    (found,) = (above.double() != 0).any(dim=1).nonzero(as_tuple=True)
    if not len(found):
        return None
    codes = above.contiguous().view(torch.uint8)
    alike = len(above) > 1 and torch.equal(codes, codes[:1].expand_as(codes)) and bool(above.isfinite().all())
    return CutRows(rows=len(found), end=vocab_size + int(found[-1]) + 1, alike=alike)


def is_padding(cut: Mapping[str, CutRows], *, tied: bool) -> bool:
    """Whether all rows above the vocabulary that are not zero can be padding rows. True if there are no such rows.

    Args:
        cut: the result of `nonzero_rows`, by Megatron tensor, without tensors for which it is None.
        tied: whether the embedding is the head, too.
    """
    embedding, head = PADDED_VOCABULARY
    with_softmax = embedding if tied else head
    return all(name == with_softmax and rows.alike for name, rows in cut.items())


def with_vocab_size(hf_config: dict[str, Any], vocab_size: int, source_size: int) -> dict[str, Any]:
    """A copy of a parsed `config.json` with another vocabulary size.

    Args:
        hf_config: the source's `config.json`.
        vocab_size: the new size.
        source_size: the source's size.

    Raises:
        CheckpointError: for a size below the source's size.
    """
    if vocab_size < source_size:
        raise CheckpointError(
            f"vocab_size must be at least {source_size}, the vocab_size in the source's config.json, got {vocab_size}: "
            "an export does not remove tokens"
        )
    changed = copy.deepcopy(hf_config)
    text = text_part(changed)
    for part in (changed, text):
        if part is not None and (part is text or "vocab_size" in part):
            part["vocab_size"] = vocab_size
    return changed
