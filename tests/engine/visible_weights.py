"""A vLLM plugin: linear layers keep their weights, so that vLLM's checksums see them.

On a CPU, vLLM packs the weight of a linear layer for its matrix product and replaces the parameter by an empty tensor.
`/weight_checker` then digests no bytes, and reports equal checksums for different weights.
"""

from __future__ import annotations

from torch import nn


def register() -> None:
    """Make vLLM pack a copy of each weight and leave the weight where it is. vLLM computes with the copy."""
    from vllm.model_executor.layers import utils

    dispatch = utils.dispatch_cpu_unquantized_gemm
    if dispatch.__module__ == __name__:
        return

    def pack_a_copy(layer: nn.Module, remove_weight: bool) -> None:
        dispatch(layer, remove_weight=False)

    utils.dispatch_cpu_unquantized_gemm = pack_a_copy
