"""What vLLM loads in every one of its processes: a receiver of weights, and gated norms in fp32.

vLLM finds `register` as an entry point of the group `vllm.general_plugins`. `VLLM_PLUGINS` leaves plugins out.
"""

from __future__ import annotations

import os

BACKEND = "megatron_fp32"
"""For `--weight-transfer-config '{"backend": "megatron_fp32"}'`."""

NORM_SWITCH = "MEGATRON_FP32_KEEP_NORM"
"""Environment variable: "0" leaves the gated norms of GDN layers in the model's dtype, as vLLM builds them."""


def register() -> None:
    """Make the backend known, and keep gated norms in fp32. vLLM may call this several times in a process."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "megatron_fp32.vllm_plugin.engine", "ReceivingEngine")
    if os.environ.get(NORM_SWITCH, "1") != "0":
        from megatron_fp32.vllm_plugin.norm import keep_gated_norm

        keep_gated_norm()
