"""Choices and defaults of options. Nothing is imported, because the command line shows them before torch is loaded."""

from __future__ import annotations

from typing import Literal

Vision = Literal["refuse", "carry", "drop"]
"""What happens to the tensors of a vision part.

- `"refuse"`: the import fails if there are any.
- `"carry"`: the import keeps them in the sidecar (`hf_source/`), and an export writes them back.
- `"drop"`: the import leaves them out.
"""

Mtp = Literal["convert", "carry", "drop"]
"""What happens to the tensors of multi-token prediction: they become a Megatron MTP layer, or see `Vision`."""

ExportDtype = Literal["trained", "source"]
"""The dtype of an exported parameter that was trained in fp32 from a 16-bit source: F32, or the source's dtype."""

Fp8Format = Literal["blockwise", "channelwise", "modelopt"]
"""Formats of FP8 checkpoints; see `Fp8Scheme`."""

PART_BYTES = 2 * 10**9
"""Default for the bytes of a data file of a Megatron checkpoint."""

SHARD_BYTES = 5 * 10**9
"""Default for the bytes of a safetensors file."""
