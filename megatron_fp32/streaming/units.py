"""What leaves the trainer, decided before any value is sent: units of tensors, their names, shapes and dtypes.

A unit is the smallest piece that a rank puts together by itself: the Hugging Face tensors of one mapping. The experts
of a layer are units of their own, also where Hugging Face stacks them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from megatron_fp32.weights.experts import expert_parts
from megatron_fp32.weights.fp8.scheme import Fp8Scheme
from megatron_fp32.weights.fp8.tensors import fp8_infos, fp8_infos_of_tensor, quantize_tensor
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.spec import TensorSpec
from megatron_fp32.weights.tensors import TensorInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contents:
    """Every tensor that a push sends, under the names of separate experts."""

    model: Mapping[str, TensorInfo]
    """Before quantization."""
    sent: Mapping[str, TensorInfo]
    """As they are sent, in the order of the layers."""

    @property
    def nbytes(self) -> int:
        """Of all tensors that are sent."""
        return sum(info.nbytes for info in self.sent.values())


def contents(mappings: Sequence[TensorMapping], infos: Mapping[str, TensorInfo], scheme: Fp8Scheme | None) -> Contents:
    """What a push sends.

    Args:
        mappings: of the model, in the order in which they are sent.
        infos: of its Hugging Face tensors, fused experts as one tensor.
        scheme: quantizes the weights that it names; None for none.

    Raises:
        CheckpointError: see `fp8_infos`.
    """
    model: dict[str, TensorInfo] = {}
    whole: dict[str, TensorInfo] = {}
    for mapping in mappings:
        for spec in mapping.hf:
            whole[spec.name] = _upright(infos[spec.name], mapping)
            model.update(_of_spec(spec, whole[spec.name]))
    if scheme is None:
        return Contents(model=model, sent=model)
    fp8_infos(whole, scheme)  # refuses what cannot be quantized
    return Contents(
        model=model,
        sent={n: i for name, info in model.items() for n, i in fp8_infos_of_tensor(name, info, scheme).items()},
    )


def _of_spec(spec: TensorSpec, info: TensorInfo) -> dict[str, TensorInfo]:
    """The tensors that one Hugging Face tensor, or an element of a stack of experts, is sent as."""
    parts = [part for part in expert_parts(spec.name, info.shape) if spec.index == (part.expert,)]
    if not parts:
        return {spec.name: info}
    return {part.name: TensorInfo(dtype=info.dtype, shape=part.shape) for part in parts}


def _upright(info: TensorInfo, mapping: TensorMapping) -> TensorInfo:
    """A stack of transposed experts as the stack of the experts, whose rows are outputs."""
    if mapping.rule != "transposed":
        return info
    *stack, columns, rows = info.shape
    return TensorInfo(dtype=info.dtype, shape=(*stack, rows, columns))


def sent_tensors(
    mapping: TensorMapping, spec: TensorSpec, info: TensorInfo, tensor: Tensor, scheme: Fp8Scheme | None
) -> Iterator[tuple[str, Tensor]]:
    """Names and values of what one Hugging Face tensor, or an element of a stack of experts, is sent as.

    Args:
        mapping: of the tensor. Experts that Hugging Face stores transposed are sent as separate experts are stored.
        spec: the tensor.
        info: of the whole tensor that `spec.name` names.
        tensor: its values, in `info.dtype`.
        scheme: see `contents`.

    Raises:
        ValueError: for infinite or NaN weights that are to be quantized, with the name and the place of the first.
    """
    if mapping.rule == "transposed":
        info, tensor = _upright(info, mapping), tensor.t().contiguous()
    parts = [part for part in expert_parts(spec.name, info.shape) if spec.index == (part.expert,)]
    named = [(part.name, tensor[part.start : part.stop]) for part in parts] or [(spec.name, tensor)]
    for name, values in named:
        if scheme is None:
            yield name, values
        else:
            yield from quantize_tensor(name, values, scheme).items()
