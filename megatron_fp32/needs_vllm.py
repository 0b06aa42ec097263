"""Every module that needs vLLM imports this first: if vLLM is missing, the error says what to do."""

from __future__ import annotations

from megatron_fp32.extras import remedy_named

with remedy_named():
    import vllm  # noqa: F401
