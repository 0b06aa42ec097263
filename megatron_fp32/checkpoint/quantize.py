"""A float8 checkpoint from a Hugging Face one in 16 bits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_fp32.checkpoint.convert import Progress, _no_progress, _staging
from megatron_fp32.checkpoint.fp8.config import MODELOPT_FILE, extra_files, quantization_config
from megatron_fp32.checkpoint.fp8.detect import read_quantization_config
from megatron_fp32.checkpoint.fp8.scheme import Fp8Scheme, named_scheme
from megatron_fp32.checkpoint.fp8.tensors import fp8_infos, quantize_tensor
from megatron_fp32.checkpoint.huggingface import CheckpointError, HuggingFaceReader, HuggingFaceWriter, TensorInfo
from megatron_fp32.checkpoint.sidecar import _WEIGHTS, digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Report:
    """What `quantize_checkpoint` did."""

    directory: Path
    scheme: Fp8Scheme
    quantized: tuple[str, ...]
    """Names of the float8 weights."""
    kept: tuple[str, ...]
    """Names of the tensors that are as they were."""
    nbytes: int
    source_nbytes: int


def quantize_checkpoint(
    hf_dir: str | Path,
    out: str | Path,
    scheme: Fp8Scheme | str,
    *,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> Fp8Report:
    """Quantize a Hugging Face checkpoint; one tensor of it is in memory at a time.

    Tensors that are not quantized keep their bytes, and files that are no weights are copied, but for `config.json`,
    which gets its `quantization_config`. The result is read back and compared with what was written before it gets its
    name.

    Args:
        hf_dir: directory with `config.json` and safetensors files.
        out: directory to make; it must not exist.
        scheme: the format, or the name of one.
        device: where to quantize. It does not change the result.
        max_shard_bytes: see `HuggingFaceWriter`.
        progress: told of every tensor.

    Raises:
        CheckpointError: when the source is incomplete, or quantized already, or nothing of it is to be quantized.
            Nothing is left behind.
        ValueError: for an unknown scheme, and for infinite or NaN weights, with the name.
    """
    hf_dir, out, tell = Path(hf_dir), Path(out), progress or _no_progress
    if isinstance(scheme, str):
        scheme = named_scheme(scheme)
    config = _read_config(hf_dir)
    with HuggingFaceReader(hf_dir) as reader:
        infos = _plan(hf_dir, reader.tensors, scheme)
        with _staging(out) as staging:
            _copy_assets(hf_dir, staging)
            config["quantization_config"] = quantization_config(infos, scheme)
            for file, content in {"config.json": config, **extra_files(infos, scheme)}.items():
                (staging / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
            writer = HuggingFaceWriter(staging, infos, max_shard_bytes=max_shard_bytes)
            total = sum(info.nbytes for info in infos.values())
            meant = {}
            for name in reader.tensors:
                for output, tensor in quantize_tensor(name, reader.read(name).to(device), scheme).items():
                    writer.write(output, tensor)
                    meant[output] = digest(tensor)
                    tell("write", tensor.nbytes, total)
            writer.finish()
            with HuggingFaceReader(staging) as written:
                for name, expected in meant.items():
                    tensor = written.read(name)
                    if digest(tensor) != expected:
                        raise CheckpointError(f"{staging}: {name!r} reads back other values than were written")
                    tell("verify", tensor.nbytes, total)
        quantized = tuple(name for name, info in infos.items() if info.dtype == torch.float8_e4m3fn)
        return Fp8Report(
            directory=out,
            scheme=scheme,
            quantized=quantized,
            kept=tuple(name for name, info in infos.items() if reader.tensors.get(name) == info),
            nbytes=total,
            source_nbytes=sum(info.nbytes for info in reader.tensors.values()),
        )


def _read_config(hf_dir: Path) -> dict[str, Any]:
    path = hf_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    found = read_quantization_config(hf_dir)
    if found is not None:
        raise CheckpointError(
            f"{hf_dir} is quantized already: {found.get('quant_method') or found.get('quantization')}"
        )
    config: dict[str, Any] = json.loads(path.read_text())
    return config


def _plan(hf_dir: Path, tensors: dict[str, TensorInfo], scheme: Fp8Scheme) -> dict[str, TensorInfo]:
    eight_bits = [n for n, i in tensors.items() if i.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)]
    if eight_bits:
        raise CheckpointError(f"{hf_dir} is quantized already: {eight_bits[0]} is {tensors[eight_bits[0]].dtype}")
    infos = fp8_infos(tensors, scheme)
    if all(info.dtype != torch.float8_e4m3fn for info in infos.values()):
        raise CheckpointError(f"{hf_dir} holds no weight that the {scheme.layout} scheme quantizes")
    return infos


def _copy_assets(hf_dir: Path, staging: Path) -> None:
    for path in sorted(hf_dir.rglob("*")):
        place = path.relative_to(hf_dir)
        hidden = any(part.startswith(".") for part in place.parts[:-1])
        if path.is_file() and not hidden and not path.name.endswith(_WEIGHTS) and path.name != MODELOPT_FILE:
            (staging / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, staging / place)
