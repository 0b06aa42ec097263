"""The words that a caller chooses from. Nothing is imported: the command line shows them before torch is loaded."""

from __future__ import annotations

from typing import Literal

Vision = Literal["refuse", "carry", "drop"]
"""Tensors of the vision part: none may be there, or they are kept beside the checkpoint, or left out."""

Mtp = Literal["convert", "carry", "drop"]
"""Tensors of multi-token prediction: they become a Megatron MTP layer, or as above."""

ExportDtype = Literal["trained", "source"]
"""A parameter that was trained in fp32 from a 16-bit source is exported as F32, or rounded to the source's dtype."""

Fp8Format = Literal["blockwise", "channelwise", "modelopt"]
"""Formats of float8 checkpoints; see `Fp8Scheme`."""

PART_BYTES = 2 * 10**9
"""Size of a data file of a Megatron checkpoint, unless the caller sets another."""

SHARD_BYTES = 5 * 10**9
"""Size of a safetensors file, unless the caller sets another."""
