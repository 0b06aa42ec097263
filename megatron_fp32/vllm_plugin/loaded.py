"""Which parameters of vLLM's model have got a tensor, and in which dtype vLLM keeps it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

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
        self._packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
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
        """Parameters without a tensor, and tensors that are missing of those that vLLM puts into one parameter.

        vLLM says that it has loaded `qkv_proj.weight` when one of three tensors has come, and fills the other parts
        with what the memory holds.

        A quantized model makes further parameters from those that were loaded, and names them differently afterwards,
        so that only the names that come from a checkpoint count. What the trainer does not have, such as a vision
        tower, the engine has loaded from its own directory.
        """
        parts = _missing_parts(manifest.tensors, self._packed)
        if not self._exact or parts:
            return parts
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


def _missing_parts(names: Collection[str], packed: Mapping[str, Sequence[str]]) -> list[str]:
    """Tensors that should have come, because others of the same parameter have."""
    there, missing = set(names), set[str]()
    experts: dict[tuple[str, str], set[str]] = {}
    for name in there:
        *path, last, kind = name.split(".")
        for parts in packed.values():
            if last in parts:
                missing |= {".".join([*path, part, kind]) for part in parts} - there
        if len(path) > 1 and path[-2] == "experts" and path[-1].isdigit():
            experts.setdefault((".".join(path[:-1]), f"{last}.{kind}"), set()).add(path[-1])
    numbers = set().union(*experts.values())
    missing |= {f"{start}.{n}.{end}" for (start, end), found in experts.items() for n in numbers - found}
    return sorted(missing)


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
