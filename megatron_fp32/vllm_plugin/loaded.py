"""Which parameters of vLLM's model have got a tensor, and in which dtype vLLM keeps it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Loaded:
    """What `load_weights` has loaded, over all buckets of a push.

    Args:
        model: before its parameters are taken apart for reloading.
    """

    def __init__(self, model: nn.Module) -> None:
        self._expected = {name: parameter.dtype for name, parameter in model.named_parameters()}
        self._mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._done: set[str] = set()
        self._exact = True
        self._sent_in_fp32: list[str] = []

    def add(self, tensors: list[tuple[str, Tensor]], loaded: Iterable[str] | None) -> None:
        """Note a bucket.

        Args:
            tensors: that were given to the model.
            loaded: the parameters that the model says it has loaded. Some models say nothing.
        """
        if loaded is None:
            self._exact = False
        else:
            self._done |= set(loaded)
        self._sent_in_fp32 += [name for name, tensor in tensors if tensor.dtype == torch.float32]

    def missing(self) -> list[str]:
        """Parameters without a tensor.

        A quantized model makes further parameters from those that were loaded, and names them differently afterwards,
        so that only the names that come from a checkpoint count.
        """
        if not self._exact:
            return []
        return sorted(name for name in self._expected.keys() - self._done if name.endswith((".weight", ".bias")))

    def rounded(self) -> list[str]:
        """Tensors that were sent in fp32, and that vLLM keeps in fewer bits."""
        names = self._sent_in_fp32
        if self._mapper is not None:
            mapped = {name: self._mapper._map_name(name) or name for name in names}
        else:
            mapped = {name: name for name in names}
        found = []
        for name, own in mapped.items():
            dtype = self._expected.get(own)
            if dtype is not None and dtype.itemsize < 4:
                found.append(name)
        return found


def forget_packed_experts(model: nn.Module) -> None:
    """Let vLLM pack the experts again that its CPU build packs on the first load only.

    vLLM 0.32 (`unquantized_fused_moe_method.py`) keeps the kernel of the first load, and answers with wrong logits and
    without an error after a reload.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if (
            method is not None
            and getattr(method, "moe_kernel", None) is not None
            and type(method).__name__.startswith("Unquantized")
        ):
            method.moe_kernel = None  # type: ignore[union-attr]
