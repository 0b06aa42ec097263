"""The gated norm of GDN layers with an fp32 weight, as checkpoints store it.

vLLM builds `RMSNormGated.weight` in the model's dtype, so that loading rounds an fp32 `linear_attn.norm.weight`
(vLLM#51836). The kernels of the norm compute in fp32 from a weight of any dtype.
"""

from __future__ import annotations

from typing import Any

import torch

_NAME = "RMSNormGated"


def keep_gated_norm() -> None:
    """Let vLLM build this norm with an fp32 weight, through its registry of replaced layers.

    Raises:
        RuntimeError: when another plugin has replaced the layer.
    """
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.layernorm import RMSNormGated

    present = op_registry_oot.get(_NAME)
    if present is not None:
        if getattr(present, "keeps_fp32", False):
            return
        raise RuntimeError(
            f"another plugin has replaced vLLM's {_NAME} by {present.__module__}.{present.__qualname__}: set "
            "MEGATRON_FP32_KEEP_NORM=0 to use that one"
        )

    class Fp32RMSNormGated(RMSNormGated):
        """`RMSNormGated` whose weight is fp32."""

        keeps_fp32 = True

        def __init__(self, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> None:
            super().__init__(*args, dtype=torch.float32, **kwargs)

    name = RMSNormGated.name
    RMSNormGated.register_oot(Fp32RMSNormGated, name=_NAME)
    # The registry's name is the class's; the name in `custom_ops` must stay the one that users switch.
    Fp32RMSNormGated.name = name
