"""Finds the scheme of an existing FP8 checkpoint, so that another checkpoint can be quantized in that scheme."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_fp32.checkpoint.formats.directory_checks import existing_directory, refuse_pointers
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.json_file import read_json_object
from megatron_fp32.errors import CheckpointError, checkpoint_named
from megatron_fp32.ops.fp8.scales import ScaleFormat
from megatron_fp32.weights.choices import Fp8Format
from megatron_fp32.weights.fp8.config import MODELOPT_FILE, scheme_from_config
from megatron_fp32.weights.fp8.scheme import Fp8Scheme
from megatron_fp32.weights.hf_config.text import text_part
from megatron_fp32.weights.tensors import TensorInfo

SCALES = (".weight_scale_inv", ".weight_scale")


def detect_scheme(directory: str | Path) -> Fp8Scheme:
    """The scheme of a directory with an FP8 checkpoint, or with only its config files.

    Headers decide which modules are quantized and how, because each producer has its own rules for lists of modules. A
    config that contradicts the headers is an error. Without weights, the config decides.

    Raises:
        CheckpointError: when the checkpoint cannot be read, or its scheme is not known.
    """
    directory = existing_directory(directory)
    refuse_pointers([directory / "config.json", directory / MODELOPT_FILE])
    config = read_quantization_config(directory)
    if any(directory.glob("*.safetensors")):
        with HuggingFaceReader(directory) as reader, checkpoint_named(directory):
            return scheme_of_tensors(reader.tensors, config)
    if config is None:
        raise CheckpointError(f"{directory} holds neither safetensors files nor a config with a quantization entry")
    with checkpoint_named(directory):
        return scheme_from_config(config)


def scheme_of_tensors(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None) -> Fp8Scheme:
    """The scheme of an FP8 checkpoint with these headers.

    Args:
        tensors: all tensors of the checkpoint.
        config: its `quantization_config`, which gives the size of blocks and must agree with the headers. With None,
            blocks are 128x128.

    Raises:
        CheckpointError: when the scheme is not known, or is not the scheme in the config.
    """
    named = None if config is None else scheme_from_config(config)
    weights = {name: info for name, info in tensors.items() if info.dtype == torch.float8_e4m3fn}
    if not weights:
        raise CheckpointError("expected float8_e4m3fn weights, but no weight is float8_e4m3fn")
    static = [name for name in tensors if name.endswith((".input_scale", ".activation_scale"))]
    if static:
        raise CheckpointError(
            f"activations have static scales, such as {static[0]}, which cannot be computed from weights"
        )
    block = (128, 128) if named is None else named.block
    possible: set[Fp8Format] = {"blockwise", "channelwise", "modelopt"}
    dtypes: set[torch.dtype] = set()
    for name, info in weights.items():
        scale_name, scale = _scale_of(name, tensors)
        possible &= _formats(info, scale_name, scale, block)
        dtypes.add(scale.dtype)
        if not possible:
            raise CheckpointError(
                f"unknown float8 scheme: {name} has the shape {info.shape} and {scale_name} has the shape "
                f"{scale.shape}; expected a scale for each block of {block} or for each row, and one layout for all "
                "weights"
            )
    (found,) = possible
    if named is not None and named.format != found:
        raise CheckpointError(f"the tensors have the format {found}, but the config says {named.format}")
    return Fp8Scheme(
        format=found,
        scale_format=_scale_format(dtypes, named),
        block=block,
        modules=frozenset(name.removesuffix(".weight") for name in weights),
    )


def read_quantization_config(directory: Path) -> dict[str, Any] | None:
    """The quantization entry of `config.json` (or of the text model in it), or `hf_quant_config.json`, or None.

    Raises:
        CheckpointError: when one of them is not a JSON object.
    """
    main = _read_json(directory / "config.json") or {}
    parts = (main, text_part(main) or {})
    # compressed-tensors before 0.8 wrote compression_config.
    entries = [part.get(key) for part in parts for key in ("quantization_config", "compression_config")]
    found = next((entry for entry in entries if entry), None)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{directory / 'config.json'}: the quantization_config must be an object")
    return found or _read_json(directory / MODELOPT_FILE)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    return read_json_object(path, finite=False)


def _scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> tuple[str, TensorInfo]:
    names = [name.removesuffix(".weight") + suffix for suffix in SCALES]
    present = [scale for scale in names if scale in tensors]
    if not name.endswith(".weight") or len(tensors[name].shape) != 2 or len(present) != 1:
        raise CheckpointError(f"unknown float8 scheme: {name} {tensors[name].shape} needs one scale, got {present}")
    return present[0], tensors[present[0]]


def _formats(info: TensorInfo, scale_name: str, scale: TensorInfo, block: tuple[int, int]) -> set[Fp8Format]:
    rows, columns = info.shape
    if scale_name.endswith("_inv"):
        return {"blockwise"} if scale.shape == (-(-rows // block[0]), -(-columns // block[1])) else set()
    shapes: dict[tuple[int, ...], Fp8Format] = {(rows, 1): "channelwise", (rows,): "modelopt"}
    return {shapes[scale.shape]} if scale.shape in shapes else set()


def _scale_format(dtypes: set[torch.dtype], named: Fp8Scheme | None) -> ScaleFormat:
    if dtypes == {torch.bfloat16}:
        return "bf16"
    if dtypes == {torch.float32}:
        return "ue8m0" if named is not None and named.scale_format == "ue8m0" else "fp32"
    raise CheckpointError(f"scales must be all float32 or all bfloat16, got {sorted(map(str, dtypes))}")
