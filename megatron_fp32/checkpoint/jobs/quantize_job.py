"""16-bit Hugging Face checkpoint -> float8 checkpoint: each part is a safetensors file."""

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
from megatron_fp32.checkpoint.fp8.detect import SCALES, read_quantization_config
from megatron_fp32.checkpoint.fp8.write import write_configs
from megatron_fp32.checkpoint.identify import check_direction, read_config, refuse_adapter
from megatron_fp32.checkpoint.jobs.read_back import SafetensorsPart
from megatron_fp32.checkpoint.jobs.run import Opener, Part, Tell, described
from megatron_fp32.checkpoint.jobs.staging import Staging
from megatron_fp32.checkpoint.quantization_claims import RECIPE, find_claims
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.fp8.config import described_scheme
from megatron_fp32.weights.fp8.scheme import Fp8Scheme
from megatron_fp32.weights.fp8.tensors import fp8_infos, infos_of, quantize_tensor
from megatron_fp32.weights.tensors import DTYPE_NAMES, TensorInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizePart(Part):
    """A safetensors file."""

    outputs: list[str]
    """Names of its tensors."""
    names: list[str]
    """Names of the source's tensors that they come from."""


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
        self.reopen: Opener = functools.partial(open_quantization, reader.directory, scheme, device, max_shard_bytes)
        self.parts: Sequence[QuantizePart] = self._cut(max_shard_bytes)

    def run(self, part: QuantizePart, path: Path, tell: Tell) -> dict[str, Any]:
        """Write a safetensors file; see `Job`."""
        with SafetensorsPart(path, {name: self.infos[name] for name in part.outputs}, Digests(), tell) as file:
            for name in part.names:
                tensor = self.reader.read(name).to(self._device)
                for output, value in quantize_tensor(name, tensor, self._scheme).items():
                    file.write(output, value)
            file.finish()
        return {}

    def finish(self, staging: Staging, records: Sequence[dict[str, Any]]) -> None:
        """Write the index and the files that are no weights; see `Job`."""
        copy_files(self.reader.directory, assets_of(self.reader.directory), staging.output)
        write_configs(staging.output, self._config, self.infos, self._scheme)
        write_index(staging.output, {part.file: part.outputs for part in self.parts}, self.infos)

    def _cut(self, limit: int) -> list[QuantizePart]:
        tensors = self.reader.tensors
        outputs = {name: list(infos_of(name, info, self._scheme)) for name, info in tensors.items()}
        shards = cut_into_shards(outputs.values(), self.infos, limit)
        place = {output: index for index, shard in enumerate(shards) for output in shard}
        sources: list[list[str]] = [[] for _ in shards]
        for name, of_name in outputs.items():
            sources[place[of_name[0]]].append(name)
        return [
            QuantizePart(file=file, nbytes=sum(self.infos[name].nbytes for name in shard), outputs=shard, names=names)
            for file, shard, names in zip(shard_names(len(shards)), shards, sources, strict=True)
        ]


@contextlib.contextmanager
def open_quantization(hf_dir: Path, scheme: Fp8Scheme, device: str, max_shard_bytes: int) -> Iterator[QuantizeJob]:
    """Raises as `quantize_checkpoint`, before anything is written."""
    check_direction("quantize", hf_dir, "huggingface", f"export {hf_dir} FP8_DIR --fp8 {scheme.format}")
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
            f"{reader.directory} holds no weight that the {scheme.format} scheme quantizes, such as "
            "model.layers.0.self_attn.q_proj.weight; docs/fp8.md lists the names"
        )
    return infos
