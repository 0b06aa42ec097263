"""Which scheme an existing float8 checkpoint has, so that others can be made like it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_fp32.checkpoint.formats.directory import existing_directory, refuse_pointers
from megatron_fp32.checkpoint.formats.files import read_json_object
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.errors import CheckpointError, checkpoint_named
from megatron_fp32.ops.fp8.scales import ScaleFormat
from megatron_fp32.weights.choices import Fp8Format
from megatron_fp32.weights.fp8.config import MODELOPT_FILE, scheme_from_config
from megatron_fp32.weights.fp8.scheme import Fp8Scheme
from megatron_fp32.weights.hf_config.text import text_part
from megatron_fp32.weights.tensors import TensorInfo

SCALES = (".weight_scale_inv", ".weight_scale")


def detect_scheme(directory: str | Path) -> Fp8Scheme:
    """The scheme of a directory with a float8 checkpoint, or with its config files alone.

    Headers decide which modules are quantized and how, since lists of modules mean something else to every producer; a
    config that contradicts them is an error. Without weights the config decides.

    Raises:
        CheckpointError: when the checkpoint is not readable, or its scheme is none of the known ones.
    """
    directory = existing_directory(directory)
    refuse_pointers([directory / "config.json", directory / MODELOPT_FILE])
    config = read_quantization_config(directory)
    if any(directory.glob("*.safetensors")):
        with HuggingFaceReader(directory) as reader, checkpoint_named(directory):
            return scheme_of_tensors(reader.tensors, config)
    if config is None:
        raise CheckpointError(f"{directory} holds neither weights nor a config that says how they are quantized")
    with checkpoint_named(directory):
        return scheme_from_config(config)


def scheme_of_tensors(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None) -> Fp8Scheme:
    """The scheme of a float8 checkpoint with these headers.

    Args:
        tensors: all of them.
        config: its `quantization_config`, to know the size of blocks and to be contradicted; None: blocks are 128x128.

    Raises:
        CheckpointError: when that is none of the known schemes, or not the config's.
    """
    named = None if config is None else scheme_from_config(config)
    weights = {name: info for name, info in tensors.items() if info.dtype == torch.float8_e4m3fn}
    if not weights:
        raise CheckpointError("no weight is float8_e4m3fn")
    static = [name for name in tensors if name.endswith((".input_scale", ".activation_scale"))]
    if static:
        raise CheckpointError(f"activations have static scales, such as {static[0]}, which weights do not tell")
    block = (128, 128) if named is None else named.block
    possible: set[Fp8Format] = {"blockwise", "channelwise", "modelopt"}
    dtypes: set[torch.dtype] = set()
    for name, info in weights.items():
        scale_name, scale = _scale_of(name, tensors)
        possible &= _formats(info, scale_name, scale, block)
        dtypes.add(scale.dtype)
        if not possible:
            raise CheckpointError(
                f"unknown float8 scheme: {name} is {info.shape} and {scale_name} is {scale.shape}, which is a scale "
                f"neither for each block of {block} nor for each row, or differs from what other weights have"
            )
    (found,) = possible
    if named is not None and named.format != found:
        raise CheckpointError(f"the headers are those of a {found} checkpoint, the config is {named.format}")
    return Fp8Scheme(
        format=found,
        scale_format=_scale_format(dtypes, named),
        block=block,
        modules=frozenset(name.removesuffix(".weight") for name in weights),
    )


def read_quantization_config(directory: Path) -> dict[str, Any] | None:
    """What `config.json` (or the text model's part of it) or `hf_quant_config.json` say of quantization, or None.

    Raises:
        CheckpointError: when they are no JSON objects.
    """
    main = _read_json(directory / "config.json") or {}
    parts = (main, text_part(main) or {})
    # compressed-tensors wrote the second before its 0.8.
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
