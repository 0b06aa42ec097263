"""The job of an import, Hugging Face -> `torch_dist`. Each part is a data file with the tensors of some mappings."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.checkpoint.assets import assets_of
from megatron_fp32.checkpoint.formats.digests import Digests, compare, digest
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.torch_dist import TRACKER
from megatron_fp32.checkpoint.formats.torch_dist_writer import (
    COMMON_STATE,
    Chunk,
    DataFile,
    common_state,
    digest_of_chunk,
    write_metadata,
)
from megatron_fp32.checkpoint.identify import check_direction, read_config, refuse_adapter
from megatron_fp32.checkpoint.jobs.read_back import ReadBack
from megatron_fp32.checkpoint.jobs.run import Opener, Part, Tell, describe_directory
from megatron_fp32.checkpoint.jobs.staging import Staging
from megatron_fp32.checkpoint.plan import ImportPlan, megatron_args, plan_import
from megatron_fp32.checkpoint.quantization_entries import find_quantization_entries
from megatron_fp32.checkpoint.sidecar import write_sidecar
from megatron_fp32.errors import CheckpointError, checkpoint_named
from megatron_fp32.weights.choices import Mtp, Vision
from megatron_fp32.weights.hf_config.rotary import inverse_frequencies
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.source_record import SourceTensor

RELEASE = "release"
"""Name of the directory of an imported checkpoint. Megatron then does not look for optimizer states."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportPart(Part):
    """A data file."""

    mappings: list[TensorMapping]


class ImportJob:
    """An import that is open in one process. `open_import` makes it."""

    def __init__(
        self,
        reader: HuggingFaceReader,
        plan: ImportPlan,
        sources: dict[str, Any],
        *,
        quantization_entries: tuple[str, ...],
        vision: Vision,
        mtp: Mtp,
        max_part_bytes: int,
        reopen: Opener,
    ) -> None:
        self.reader, self.plan, self._max_part_bytes = reader, plan, max_part_bytes
        self.options = {"vision": vision, "mtp": mtp, "max_part_bytes": max_part_bytes}
        self.sources = sources
        self.quantization_entries, self.reopen = quantization_entries, reopen
        self.parts: Sequence[ImportPart] = self._cut()

    def run(self, part: ImportPart, path: Path, tell: Tell) -> dict[str, Any]:
        """Write a data file; see `Job`."""
        digests = Digests()

        def check(written: Sequence[tuple[Chunk, str]]) -> None:
            for chunk, expected in written:
                compare(digest_of_chunk(path, chunk), expected, path, chunk.name)

        # No checksums, because each tensor is read back and compared by digest, and `torch.load` ignores checksums.
        with (
            DataFile(path, checksums=False) as file,
            ReadBack(path, functools.partial(tell, "verify")) as read_back,
        ):
            for mapping in part.mappings:
                written = []
                for target, tensor in zip(mapping.megatron, self._megatron_tensors(mapping, digests), strict=True):
                    file.write(target.name, tensor, index=target.index, stack=target.stack)
                    written.append((file.chunks[-1], digest(tensor)))
                tell("write", self._nbytes(mapping))
                read_back.add(self._nbytes(mapping), functools.partial(check, written))
            read_back.finish()
            file.close(durable=True)
        return {"chunks": [chunk.to_json() for chunk in file.chunks], "digests": digests.to_json()}

    def finish(self, staging: Staging, records: Sequence[dict[str, Any]]) -> None:
        """Write the objects, the metadata and the sidecar; see `Job`."""
        common = common_state(megatron_args(self.plan.config))
        objects = f"__{len(self.parts)}_0.distcp"
        with staging.file(f"{RELEASE}/{objects}") as path, DataFile(path) as file:
            for key in self.plan.extra_states:
                file.write_object(key, torch.empty(0, dtype=torch.uint8))
            file.write_object(COMMON_STATE, common)
            file.close(durable=True)
        files = [
            (Path(part.file).name, [Chunk.from_json(chunk) for chunk in record["chunks"]])
            for part, record in zip(self.parts, records, strict=True)
        ]
        write_metadata(staging.output / RELEASE, [*files, (objects, file.chunks)], common)
        (staging.output / TRACKER).write_text(RELEASE)
        originals = {
            spec.name: self.reader.read(spec.name)
            for mapping in self.plan.mappings
            if not mapping.invertible
            for spec in mapping.hf
        }
        write_sidecar(staging, self.reader, self.plan, tensors=self.source(records), originals=originals)

    def source(self, records: Sequence[dict[str, Any]]) -> dict[str, SourceTensor]:
        """The Hugging Face tensors that were converted, from the records of the parts."""
        digests = Digests()
        for record in records:
            digests.merge(record["digests"])
        return {n: SourceTensor(info=self.reader.tensors[n], digest=d) for n, d in digests.by_name().items()}

    def other_frequencies(self) -> tuple[str, ...]:
        """Names of stored rotary frequencies that differ from those in `config.json`."""
        config = self.plan.config
        expected = inverse_frequencies(
            config.head_dim, config.rope_theta, config.partial_rotary_factor, config.rope_scaling
        )
        return tuple(name for name in self.plan.frequencies if not is_about(self.reader.read(name), expected))

    def _megatron_tensors(self, mapping: TensorMapping, digests: Digests) -> tuple[Tensor, ...]:
        tensors = [self.reader.read(spec.name, spec.index) for spec in mapping.hf]
        for spec, tensor in zip(mapping.hf, tensors, strict=True):
            digests.add(spec.name, tensor, spec.index)
        try:
            return mapping.to_megatron(tensors)
        except ValueError as error:
            raise CheckpointError(f"{self.reader.directory}: {error}") from error

    def _nbytes(self, mapping: TensorMapping) -> int:
        """Size of the mapping's Hugging Face tensors in bytes."""
        return sum(self.reader.tensors[s.name].dtype.itemsize * torch.Size(s.shape).numel() for s in mapping.hf)

    def _cut(self) -> list[ImportPart]:
        cuts: list[list[TensorMapping]] = [[]]
        sizes = [0]
        for mapping in self.plan.mappings:
            nbytes = self._nbytes(mapping)
            if cuts[-1] and sizes[-1] + nbytes > self._max_part_bytes:
                cuts.append([])
                sizes.append(0)
            cuts[-1].append(mapping)
            sizes[-1] += nbytes
        return [
            ImportPart(file=f"{RELEASE}/__{index}_0.distcp", nbytes=nbytes, mappings=mappings)
            for index, (mappings, nbytes) in enumerate(zip(cuts, sizes, strict=True))
        ]


def is_about(stored: Tensor, expected: Tensor) -> bool:
    """Whether the values are equal up to the rounding of the stored dtype and of powers in fp32."""
    if not stored.is_floating_point() or stored.dtype.itemsize < 2 or stored.shape != expected.shape:
        return False
    kind = torch.finfo(stored.dtype)
    return torch.allclose(stored.double(), expected, rtol=max(kind.eps, 1e-5), atol=kind.tiny * kind.eps)


@contextlib.contextmanager
def open_import(hf_dir: Path, vision: Vision, mtp: Mtp, max_part_bytes: int) -> Iterator[ImportJob]:
    """Open an import. It raises the errors of `import_checkpoint` before anything is written."""
    check_direction("import", hf_dir, "huggingface", f"export {hf_dir} HF_DIR")
    assets_of(hf_dir)
    sources = {"source": describe_directory(hf_dir)}
    refuse_adapter(hf_dir)
    config = read_config(hf_dir)
    with HuggingFaceReader(hf_dir) as reader:
        with checkpoint_named(reader.directory):
            plan = plan_import(config, reader.tensors, vision=vision, mtp=mtp)
        yield ImportJob(
            reader,
            plan,
            sources,
            quantization_entries=find_quantization_entries(hf_dir, config),
            vision=vision,
            mtp=mtp,
            max_part_bytes=max_part_bytes,
            reopen=functools.partial(open_import, hf_dir, vision, mtp, max_part_bytes),
        )
