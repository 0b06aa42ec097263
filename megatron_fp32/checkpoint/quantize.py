"""A float8 checkpoint from a Hugging Face one in 16 bits: each part is a safetensors file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_fp32.checkpoint.assets import assets_of, copy_files
from megatron_fp32.checkpoint.formats.digests import Digests
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.safetensors_writer import cut_into_shards, shard_names, write_index
from megatron_fp32.checkpoint.fp8.config import described_scheme, write_configs
from megatron_fp32.checkpoint.fp8.detect import SCALES, read_quantization_config
from megatron_fp32.checkpoint.identify import check_direction, read_config, refuse_adapter
from megatron_fp32.checkpoint.jobs.read_back import SafetensorsPart
from megatron_fp32.checkpoint.jobs.run import Part, Progress, Tell, described, run_job
from megatron_fp32.checkpoint.jobs.staging import Staging, check_output
from megatron_fp32.checkpoint.quantization_claims import RECIPE, find_claims
from megatron_fp32.errors import CheckpointError
from megatron_fp32.validation import check_callable, check_count, check_path
from megatron_fp32.weights.fp8.scheme import LAYOUTS, Fp8Scheme, named_scheme
from megatron_fp32.weights.fp8.tensors import fp8_infos, infos_of, partial_blocks, quantize_tensor
from megatron_fp32.weights.tensors import DTYPE_NAMES, TensorInfo


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
    max_shard_bytes: int = 5 * 10**9,
    workers: int = 1,
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
        raise TypeError(f"scheme must be an Fp8Scheme or one of {LAYOUTS}, got {scheme!r}")
    _check_device(device)
    check_output(Path(out))
    open_job = functools.partial(open_quantization, Path(hf_dir), scheme, str(device), max_shard_bytes)
    with open_job() as job:
        run_job(job, open_job, Path(out), workers=workers, progress=progress)
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


class QuantizeJob:
    """A quantization, open in one process. Made by `open_quantization`."""

    def __init__(
        self,
        reader: HuggingFaceReader,
        config: dict[str, Any],
        scheme: Fp8Scheme,
        sources: dict[str, Any],
        *,
        device: str,
        max_shard_bytes: int,
    ) -> None:
        self.reader, self._config, self._scheme, self._device = reader, config, scheme, device
        self.claims = find_claims(reader.directory, config)
        self.infos = _plan(reader, scheme)
        self.options = {"scheme": described_scheme(scheme), "max_shard_bytes": max_shard_bytes}
        self.sources = sources
        self.parts: Sequence[Part] = self._cut(max_shard_bytes)

    def run(self, part: Part, path: Path, tell: Tell) -> dict[str, Any]:
        """Write a safetensors file; see `Job`."""
        outputs, names = part.steps
        with SafetensorsPart(path, {name: self.infos[name] for name in outputs}, Digests(), tell) as file:
            for name in names:
                tensor = self.reader.read(name).to(self._device)
                for output, value in quantize_tensor(name, tensor, self._scheme).items():
                    file.write(output, value)
            file.finish()
        return {}

    def finish(self, staging: Staging, records: Sequence[dict[str, Any]]) -> None:
        """Write the index and the files that are no weights; see `Job`."""
        copy_files(self.reader.directory, assets_of(self.reader.directory), staging.output)
        write_configs(staging.output, self._config, self.infos, self._scheme)
        write_index(staging.output, {part.file: part.steps[0] for part in self.parts}, self.infos)

    def _cut(self, limit: int) -> list[Part]:
        tensors = self.reader.tensors
        outputs = {name: list(infos_of(name, info, self._scheme)) for name, info in tensors.items()}
        shards = cut_into_shards(outputs.values(), self.infos, limit)
        place = {output: index for index, shard in enumerate(shards) for output in shard}
        sources: list[list[str]] = [[] for _ in shards]
        for name, of_name in outputs.items():
            sources[place[of_name[0]]].append(name)
        return [
            Part(file=file, nbytes=sum(self.infos[name].nbytes for name in shard), steps=(shard, names))
            for file, shard, names in zip(shard_names(len(shards)), shards, sources, strict=True)
        ]


@contextlib.contextmanager
def open_quantization(hf_dir: Path, scheme: Fp8Scheme, device: str, max_shard_bytes: int) -> Iterator[QuantizeJob]:
    """Raises as `quantize_checkpoint`, before anything is written."""
    check_direction("quantize", hf_dir, "huggingface", f"export {hf_dir} FP8_DIR --fp8 {scheme.layout}")
    assets_of(hf_dir)
    sources = {"source": described(hf_dir)}
    refuse_adapter(hf_dir)
    config = read_config(hf_dir)
    with HuggingFaceReader(hf_dir) as reader:
        _refuse_quantized(reader, config)
        yield QuantizeJob(reader, config, scheme, sources, device=device, max_shard_bytes=max_shard_bytes)


def _refuse_quantized(reader: HuggingFaceReader, config: dict[str, Any]) -> None:
    """Whatever says that it is quantized, tensors or config, must be gone before a checkpoint is quantized."""
    directory, tensors = reader.directory, reader.tensors
    quantized = [
        name
        for name, info in tensors.items()
        if (info.dtype.is_floating_point and info.dtype.itemsize < 2)
        or (name.endswith(".weight") and not info.dtype.is_floating_point)
        or name.endswith((*SCALES, ".qweight", ".weight_packed"))
    ]
    found = read_quantization_config(directory)
    if quantized:
        example = f"{quantized[0]} is {tensors[quantized[0]].dtype}"
        method = (found or {}).get("quant_method") or (found or {}).get("quantization")
        raise CheckpointError(f"{directory} is quantized already: {f'{method}, ' if method else ''}{example}")
    # A recipe without one of the others is no reason: it is left out.
    claims = [claim for claim in find_claims(directory, config) if claim != RECIPE]
    if claims:
        dtypes = " and ".join(sorted({DTYPE_NAMES[info.dtype] for info in tensors.values()}))
        raise CheckpointError(
            f"{directory}: {', '.join(claims)} says that the weights are quantized, which contradicts the tensors: "
            f"they are {dtypes}, without scales. Take it away to quantize them"
        )


def _plan(reader: HuggingFaceReader, scheme: Fp8Scheme) -> dict[str, TensorInfo]:
    infos = fp8_infos(reader.tensors, scheme)
    if all(info.dtype != torch.float8_e4m3fn for info in infos.values()):
        raise CheckpointError(
            f"{reader.directory} holds no weight that the {scheme.layout} scheme quantizes, such as "
            "model.layers.0.self_attn.q_proj.weight; docs/fp8.md lists the names"
        )
    return infos
