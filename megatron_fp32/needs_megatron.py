"""Every module that needs megatron-core imports this first: if megatron-core is missing, the error says what to do."""

from __future__ import annotations

from megatron_fp32.extras import remedy_named

with remedy_named():
    # `import megatron.core` alone does not import the packages that megatron-core needs, such as Triton.
    import megatron.core.models.gpt  # noqa: F401
