"""Quantization of a 16-bit Hugging Face checkpoint to float8."""

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
    kept: tuple[str, ...]
    """Names of the tensors that are as they were."""
    quantization_claims: tuple[str, ...]
    """Files of the source that told of another quantization, and were left out."""
    partial_blocks: tuple[str, ...]
    """Block-wise float8 weights with rows or columns that are no multiple of the block's: not every reader takes their
    scales as they are meant."""
    nbytes: int
    source_nbytes: int


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
    """Quantize a Hugging Face checkpoint; one tensor of it is in memory at a time.

    Tensors that are not quantized keep their bytes, and files that are no weights are copied, but for `config.json`,
    which gets its `quantization_config`. The result is read back and compared with what was written before it gets its
    name.

    Args:
        hf_dir: directory with `config.json` and safetensors files.
        out: directory to make; it must not exist.
        scheme: the format, or the name of one.
        device: where to quantize. It does not change the result.
        max_shard_bytes: a file is closed before it grows past this.
        workers: see `import_checkpoint`.
        progress: told of every tensor.

    Raises:
        CheckpointError: when the source is incomplete, or quantized already, or nothing of it is to be quantized.
            Nothing is left behind.
        OSError: as `import_checkpoint`.
        ValueError: for an unknown scheme, a device that is not there, another argument with a value that is not
            allowed, and for infinite or NaN weights, with the name.
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
            kept=tuple(name for name, info in job.infos.items() if job.reader.tensors.get(name) == info),
            quantization_claims=job.claims,
            partial_blocks=partial_blocks(job.infos, scheme),
            nbytes=sum(info.nbytes for info in job.infos.values()),
            source_nbytes=sum(info.nbytes for info in job.reader.tensors.values()),
        )


def _check_device(device: torch.device | str) -> None:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one of torch's, such as 'cpu' or 'cuda:0', got {device!r}") from error
    try:
        torch.zeros(1, device=place).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(place)!r} cannot be used on this machine ({reason}); use 'cpu'") from error
