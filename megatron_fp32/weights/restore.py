"""Convert the tensors of a Megatron model back to Hugging Face tensors.

Export and verify use this module, and so does everything that sends the weights of a live model. So all of them treat
three things alike: padding rows of the vocabulary, tensors whose conversion cannot be undone exactly, and dtypes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from megatron_fp32.weights.choices import ExportDtype
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.source import TensorSource
from megatron_fp32.weights.source_record import SourceRecord
from megatron_fp32.weights.tensors import TensorInfo
from megatron_fp32.weights.vocabulary import PADDED_VOCABULARY


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """The Hugging Face tensors of one mapping."""

    hf: tuple[Tensor, ...]
    """In the order of `TensorMapping.hf`, in Megatron's dtype. An original has its own dtype."""
    is_original: bool
    """The tensors are the originals that the import kept, with all of their bits."""
    above_vocabulary: Mapping[str, Tensor]
    """For each Megatron tensor, its rows above the vocabulary, [rows, hidden]. No Hugging Face tensor has them."""


class Restorer:
    """Reads Megatron tensors and converts them to the Hugging Face tensors of a mapping.

    Args:
        source: the Megatron tensors.
        originals: the Hugging Face tensors, by name, that an import kept because their conversion cannot be undone
            exactly (`TensorMapping.invertible`). They are returned if the Megatron tensors still have exactly the
            values that the import gave them.
    """

    def __init__(self, source: TensorSource, originals: Mapping[str, Tensor]) -> None:
        self.source, self.originals = source, originals

    def restore(self, mapping: TensorMapping, *, originals: Mapping[str, Tensor] | None = None) -> Restored:
        """The Hugging Face tensors of a mapping, without padding rows of the vocabulary.

        Args:
            mapping: one of the model's mappings.
            originals: used instead of the originals of the constructor.
        """
        tensors, above = [], {}
        for spec in mapping.megatron:
            tensor = self.source.read(spec.name, spec.index)
            if spec.name in PADDED_VOCABULARY and tensor.shape[0] > spec.shape[0]:
                tensor, above[spec.name] = tensor[: spec.shape[0]], tensor[spec.shape[0] :]
            tensors.append(tensor)
        known = self.originals if originals is None else originals
        exact, is_original = _exact_hf_tensors(mapping, tensors, known)
        return Restored(hf=exact, is_original=is_original, above_vocabulary=above)


def _exact_hf_tensors(
    mapping: TensorMapping, megatron: Sequence[Tensor], originals: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], bool]:
    """The Hugging Face tensors, on the device of the Megatron tensors, and whether they are the originals."""
    names = [spec.name for spec in mapping.hf]
    if not mapping.invertible and all(name in originals for name in names):
        imported = mapping.to_megatron([originals[name].to(megatron[0].device) for name in names])
        if all(_same_values(a, b) for a, b in zip(imported, megatron, strict=True)):
            return tuple(originals[name].to(megatron[0].device) for name in names), True
    return mapping.to_hf(megatron), False


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


# Dtypes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dtypes:
    """The dtype of every exported tensor."""

    infos: Mapping[str, TensorInfo]
    rounded: tuple[str, ...]
    """Tensors that have fewer bits in Megatron than in the source."""
    widened: tuple[str, ...]
    """Tensors that are F32 in Megatron and have values that are not exact in the source's dtype."""


def decide_dtypes(
    mappings: Sequence[TensorMapping], restorer: Restorer, record: SourceRecord, dtype: ExportDtype
) -> Dtypes:
    """Decide the dtype of each exported tensor.

    It is the source's dtype if Megatron has as many bits, or if all values are exact in the source's dtype. Only
    tensors with different dtypes in Megatron and in the source are read.

    Args:
        mappings: the mappings of the model.
        restorer: reads the model's Megatron tensors.
        record: the record that the import made of its source.
        dtype: the dtype of tensors that were trained in fp32 from a 16-bit source.
    """
    infos: dict[str, TensorInfo] = {}
    rounded: dict[str, None] = {}
    widened: dict[str, None] = {}
    for mapping in mappings:
        stored = {restorer.source.tensors[spec.name].dtype for spec in mapping.megatron}
        sources = {
            spec.name: dataclasses.replace(record.tensors[spec.name].info, shape=spec.stored_shape)
            for spec in mapping.hf
        }
        infos.update({name: info for name, info in sources.items() if name not in widened})
        if not must_be_read(mapping, restorer.source.tensors, record):
            continue
        restored = restorer.restore(mapping)
        for (name, info), tensor in zip(sources.items(), restored.hf, strict=True):
            is_kept = restored.is_original and tensor.dtype == info.dtype
            if is_kept or (torch.float32 in stored and is_exact_in(tensor, info.dtype)):
                continue
            if stored == {torch.float32}:
                # One element of a stack widens the whole stack.
                widened[name] = None
                if dtype == "trained":
                    infos[name] = TensorInfo(dtype=torch.float32, shape=info.shape)
            else:
                rounded[name] = None
    return Dtypes(infos=infos, rounded=tuple(rounded), widened=tuple(widened))


def must_be_read(mapping: TensorMapping, megatron: Mapping[str, TensorInfo], record: SourceRecord) -> bool:
    """Whether the dtypes of a mapping's Hugging Face tensors depend on its values.

    Args:
        mapping: one of the model's mappings.
        megatron: dtype and shape of every Megatron tensor.
        record: the record that the import made of its source.
    """
    stored = {megatron[spec.name].dtype for spec in mapping.megatron}
    return not mapping.invertible or stored != {record.tensors[spec.name].info.dtype for spec in mapping.hf}


def is_exact_in(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value of the tensor is exact in `dtype`, bit for bit."""
    back = tensor.to(dtype).to(tensor.dtype)
    return torch.equal(back.view(torch.uint8), tensor.contiguous().view(torch.uint8)) if tensor.numel() else True


def narrowed_if_exact(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 tensor cast to `dtype` if that is floating-point and keeps every bit; otherwise the tensor itself."""
    is_cast = tensor.dtype == torch.float32 and dtype.is_floating_point and is_exact_in(tensor, dtype)
    return tensor.to(dtype) if is_cast else tensor
