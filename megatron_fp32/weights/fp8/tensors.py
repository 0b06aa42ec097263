"""The tensors of a float8 checkpoint from those of a model: names, dtypes and shapes first, values one at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_fp32.errors import CheckpointError
from megatron_fp32.ops.fp8 import Quantized, quantize_blockwise, quantize_channelwise
from megatron_fp32.ops.fp8.scales import scale_dtype
from megatron_fp32.weights.experts import check_fused_experts, expert_parts
from megatron_fp32.weights.fp8.scheme import Fp8Scheme, is_quantized
from megatron_fp32.weights.tensors import TensorInfo


def fp8_infos(infos: Mapping[str, TensorInfo], scheme: Fp8Scheme) -> dict[str, TensorInfo]:
    """What the tensors of the float8 checkpoint are, from the headers of the model's.

    Fused experts leave as one tensor each where any of them is quantized.

    Args:
        infos: all tensors of the model.
        scheme: the format.

    Raises:
        CheckpointError: for fused experts that are laid out otherwise, and for weights that the scheme's `modules` name
            but that are never quantized.
    """
    check_fused_experts(infos)
    found: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        outputs = infos_of(name, info, scheme)
        if not found.keys().isdisjoint(outputs):
            raise CheckpointError(f"the tensors {sorted(found.keys() & outputs)} would be there twice")
        found.update(outputs)
    refused = [
        name
        for name, info in found.items()
        if info.dtype != torch.float8_e4m3fn and name.removesuffix(".weight") in (scheme.modules or ())
    ]
    if refused:
        raise CheckpointError(f"the scheme's checkpoint has float8 weights that are never quantized here: {refused}")
    return found


def infos_of(name: str, info: TensorInfo, scheme: Fp8Scheme) -> dict[str, TensorInfo]:
    """What one tensor of the model becomes; `fp8_infos` has checked it among the others."""
    found: dict[str, TensorInfo] = {}
    for part, part_info in _unfused(name, info, scheme).items():
        quantized = is_quantized(part, part_info, scheme)
        found.update(_quantized_infos(part, part_info, scheme) if quantized else {part: part_info})
    return found


def quantize_element(
    name: str, info: TensorInfo, index: tuple[int, ...], tensor: Tensor, scheme: Fp8Scheme
) -> list[tuple[str, tuple[int, ...], Tensor]]:
    """As `quantize_tensor`, where a tensor may come element by element.

    Args:
        name: of the whole tensor.
        info: what that is.
        index: which element of it this is; empty for all of it.
        tensor: the values.
        scheme: the format.

    Returns:
        Name, index and values of what it becomes.

    Raises:
        ValueError: for infinite or NaN weights, with the name and the place of the first.
    """
    if not index:
        return [(output, (), value) for output, value in quantize_tensor(name, tensor, scheme).items()]
    if name in _unfused(name, info, scheme):
        return [(name, index, tensor)]
    assert len(index) == 1
    return [
        (output, (), value)
        for part in expert_parts(name, info.shape)
        if part.expert == index[0]
        for output, value in quantize_tensor(part.name, tensor[part.start : part.stop], scheme).items()
    ]


def quantize_tensor(name: str, tensor: Tensor, scheme: Fp8Scheme, *, check: bool = True) -> dict[str, Tensor]:
    """The tensors of the float8 checkpoint that one of the model's becomes, as `fp8_infos` announces them.

    Args:
        name: its name in the model.
        tensor: its values, on any device.
        scheme: the format.
        check: see `quantize_blockwise`.

    Raises:
        ValueError: for infinite or NaN weights, with the name and the place of the first.
    """
    info = TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape))
    parts = expert_parts(name, info.shape)
    try:
        if not parts or name in _unfused(name, info, scheme):
            if not is_quantized(name, info, scheme):
                return {name: tensor}
            return _outputs(name, _quantize(tensor, scheme, check), scheme)
        found: dict[str, Tensor] = {}
        rows = {(part.start, part.stop) for part in parts}
        quantized = {(start, stop): _quantize(tensor[:, start:stop], scheme, check) for start, stop in rows}
        for part in parts:
            stack = quantized[part.start, part.stop]
            if is_quantized(part.name, TensorInfo(dtype=info.dtype, shape=part.shape), scheme):
                one = Quantized(stack.weight[part.expert], stack.scale[part.expert])
                found.update(_outputs(part.name, one, scheme))
            else:
                found[part.name] = tensor[part.expert, part.start : part.stop]
        return found
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def partial_blocks(infos: Mapping[str, TensorInfo], scheme: Fp8Scheme) -> tuple[str, ...]:
    """Names of float8 weights with a last block of fewer rows or columns than the others.

    Args:
        infos: all tensors of the float8 checkpoint.
        scheme: its format; only "blockwise" has blocks.
    """
    if scheme.format != "blockwise":
        return ()
    return tuple(
        name
        for name, info in infos.items()
        if info.dtype == torch.float8_e4m3fn
        and any(size % block for size, block in zip(info.shape, scheme.block, strict=True))
    )


def _unfused(name: str, info: TensorInfo, scheme: Fp8Scheme) -> dict[str, TensorInfo]:
    parts = {p.name: TensorInfo(dtype=info.dtype, shape=p.shape) for p in expert_parts(name, info.shape)}
    return parts if any(is_quantized(part, i, scheme) for part, i in parts.items()) else {name: info}


def _scale_name(weight: str, scheme: Fp8Scheme) -> str:
    return weight.removesuffix(".weight") + scheme.scale_suffix


def _quantized_infos(name: str, info: TensorInfo, scheme: Fp8Scheme) -> dict[str, TensorInfo]:
    rows, columns = info.shape
    shapes: dict[str, tuple[int, ...]] = {
        "blockwise": (-(-rows // scheme.block[0]), -(-columns // scheme.block[1])),
        "channelwise": (rows, 1),
        "modelopt": (rows,),
    }
    return {
        name: TensorInfo(dtype=torch.float8_e4m3fn, shape=info.shape),
        _scale_name(name, scheme): TensorInfo(dtype=scale_dtype(scheme.scale_format), shape=shapes[scheme.format]),
    }


def _quantize(weight: Tensor, scheme: Fp8Scheme, check: bool) -> Quantized:
    if scheme.format == "blockwise":
        return quantize_blockwise(
            weight, scheme.block, scale_format=scheme.scale_format, zero_scale=scheme.zero_scale, check=check
        )
    return quantize_channelwise(weight, scale_format=scheme.scale_format, zero_scale=scheme.zero_scale, check=check)


def _outputs(name: str, quantized: Quantized, scheme: Fp8Scheme) -> dict[str, Tensor]:
    scale = quantized.scale.squeeze(-1) if scheme.format == "modelopt" else quantized.scale
    return {name: quantized.weight, _scale_name(name, scheme): scale}
