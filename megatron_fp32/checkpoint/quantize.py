"""Quantizes a Hugging Face checkpoint of 16 bits or more to float8."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from megatron_fp32.checkpoint.jobs.quantize_job import open_quantization
from megatron_fp32.checkpoint.jobs.run import run_job
from megatron_fp32.checkpoint.jobs.staging import check_output
from megatron_fp32.checkpoint.progress import ProgressCallback
from megatron_fp32.validation import check_callable, check_count, check_path
from megatron_fp32.weights.choices import SHARD_BYTES
from megatron_fp32.weights.fp8.scheme import FP8_FORMATS, Fp8Scheme, named_scheme
from megatron_fp32.weights.fp8.tensors import partial_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Report:
    """What `quantize_checkpoint` did."""

    directory: Path
    scheme: Fp8Scheme
    quantized: tuple[str, ...]
    """Names of the float8 weights."""
    unchanged: tuple[str, ...]
    """Names of the tensors that were not changed."""
    quantization_entries: tuple[str, ...]
    """Files of the source that describe another quantization, and were left out."""
    partial_blocks: tuple[str, ...]
    """Block-wise float8 weights whose rows or columns are not a multiple of the block's. Some readers get the scales of
    such weights wrong."""
    nbytes: int
    """Size of all tensors of the FP8 checkpoint in bytes."""
    source_nbytes: int
    """Size of all tensors of the source in bytes."""


def quantize_checkpoint(
    hf_dir: str | Path,
    out: str | Path,
    scheme: Fp8Scheme | str,
    *,
    device: torch.device | str = "cpu",
    max_shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    progress: ProgressCallback | None = None,
) -> Fp8Report:
    """Quantize a Hugging Face checkpoint, with one tensor in memory at a time.

    Tensors that are not quantized keep their bytes. Assets are copied, and `config.json` gets a `quantization_config`.
    Every tensor is read back from the disk and compared before the output is renamed to its final name.

    Args:
        hf_dir: directory with `config.json` and safetensors files.
        out: directory to make; it must not exist.
        scheme: the format, or its name.
        device: the device to quantize on. The result does not depend on it.
        max_shard_bytes: most bytes of tensors in a file. A larger tensor gets a file of its own.
        workers: see `import_checkpoint`.
        progress: called after every tensor; see `ProgressCallback`.

    Raises:
        CheckpointError: when the source is incomplete or quantized already, or has no weight that the scheme
            quantizes. No output is left.
        OSError: see `import_checkpoint`.
        ValueError: for an unknown scheme, a device that cannot be used, an argument with a value that is not allowed,
            and infinite or NaN weights, with the name of the weight.
        TypeError: for an argument of another type.
    """
    check_path("hf_dir", hf_dir)
    check_path("out", out)
    check_count("max_shard_bytes", max_shard_bytes)
    check_count("workers", workers)
    check_callable("progress", progress)
    if isinstance(scheme, str):
        scheme = named_scheme(scheme)
    if not isinstance(scheme, Fp8Scheme):
        raise TypeError(f"scheme must be an Fp8Scheme or one of {FP8_FORMATS}, got {scheme!r}")
    _check_device(device)
    check_output(Path(out))
    with open_quantization(Path(hf_dir), scheme, str(device), max_shard_bytes) as job:
        run_job(job, Path(out), workers=workers, progress=progress)
        return Fp8Report(
            directory=Path(out),
            scheme=scheme,
            quantized=tuple(name for name, info in job.infos.items() if info.dtype == torch.float8_e4m3fn),
            unchanged=tuple(name for name, info in job.infos.items() if job.reader.tensors.get(name) == info),
            quantization_entries=job.quantization_entries,
            partial_blocks=partial_blocks(job.infos, scheme),
            nbytes=sum(info.nbytes for info in job.infos.values()),
            source_nbytes=sum(info.nbytes for info in job.reader.tensors.values()),
        )


def _check_device(device: torch.device | str) -> None:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a device of torch, such as 'cpu' or 'cuda:0', got {device!r}") from error
    try:
        torch.zeros(1, device=place).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(place)!r} cannot be used on this machine ({reason}); use 'cpu'") from error
