"""Which parameters of vLLM's model have got a tensor, and in which dtype vLLM keeps it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from megatron_fp32.transfer.manifest import Manifest


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

    def missing(self, manifest: Manifest) -> list[str]:
        """Parameters without a tensor.

        A quantized model makes further parameters from those that were loaded, and names them differently afterwards,
        so that only the names that come from a checkpoint count. What the trainer does not have, such as a vision
        tower, the engine has loaded from its own directory.
        """
        if not self._exact:
            return []
        kept = {self._root(name) for name in manifest.carried} - {self._root(name) for name in manifest.tensors}
        missing = (name for name in self._expected.keys() - self._done if name.endswith((".weight", ".bias")))
        return sorted(name for name in missing if name.partition(".")[0] not in kept)

    def rounded(self) -> list[str]:
        """Tensors that were sent in fp32, and that vLLM keeps in fewer bits."""
        dtypes = {name: self._expected.get(self._own_name(name)) for name in self._sent_in_fp32}
        return [name for name, dtype in dtypes.items() if dtype is not None and dtype.itemsize < 4]

    def _own_name(self, name: str) -> str:
        """The engine's name for a tensor of a checkpoint."""
        return name if self._mapper is None else self._mapper._map_name(name) or name

    def _root(self, name: str) -> str:
        return self._own_name(name).partition(".")[0]


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
