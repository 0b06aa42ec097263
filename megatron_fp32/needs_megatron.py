"""Imported by every module that needs megatron-core, before it: where that is missing, the error says what to do."""

from __future__ import annotations

from megatron_fp32.extras import remedy_named

with remedy_named():
    # megatron.core alone does not import what megatron-core itself needs, such as Triton.
    import megatron.core.models.gpt  # noqa: F401
