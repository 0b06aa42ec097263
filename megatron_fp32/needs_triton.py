"""Every module of kernels imports this before Triton: if Triton is missing, the error says what to do."""

from __future__ import annotations

from megatron_fp32.extras import remedy_named

with remedy_named():
    import triton  # noqa: F401
