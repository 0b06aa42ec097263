"""The job of an export, `torch_dist` -> Hugging Face. Each part is a safetensors file."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_fp32.checkpoint.formats.digests import Digests
from megatron_fp32.checkpoint.formats.safetensors_writer import cut_into_shards, shard_names, write_index
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader, known_non_model_entries
from megatron_fp32.checkpoint.fp8.write import write_configs
from megatron_fp32.checkpoint.identify import check_direction
from megatron_fp32.checkpoint.jobs.read_back import SafetensorsPart
from megatron_fp32.checkpoint.jobs.run import Opener, Part, Tell, describe_directory
from megatron_fp32.checkpoint.jobs.staging import Staging
from megatron_fp32.checkpoint.quantization_entries import (
    find_quantization_entries,
    remove_quantization_entries,
    write_config,
)
from megatron_fp32.checkpoint.sidecar import CarriedTensors, Sidecar, find_sidecar
from megatron_fp32.errors import CheckpointError, checkpoint_named, listing
from megatron_fp32.weights.choices import ExportDtype
from megatron_fp32.weights.families.registry import find_family
from megatron_fp32.weights.fp8.config import described_scheme
from megatron_fp32.weights.fp8.scheme import Fp8Scheme
from megatron_fp32.weights.fp8.tensors import fp8_infos, fp8_infos_of_tensor, quantize_element
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.model_map import ModelMap, map_trained_model
from megatron_fp32.weights.restore import Dtypes, Restorer, decide_dtypes
from megatron_fp32.weights.vocabulary import PADDED_VOCABULARY, CutRows, nonzero_rows, with_vocab_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The arguments of `export_checkpoint`."""

    megatron_dir: Path
    source: Path | None
    allow_rounded: bool
    dtype: ExportDtype
    fp8: Fp8Scheme | None
    max_shard_bytes: int
    vocab_size: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportPart(Part):
    """A safetensors file."""

    outputs: list[str]
    """Names of the tensors in the file."""
    mappings: list[TensorMapping]
    """The mappings of tensors that are converted."""
    carried: list[str]
    """Names of the tensors that are copied from the sidecar."""


class ExportJob:
    """An export that is open in one process. `open_export` makes it."""

    def __init__(
        self,
        reader: TorchDistReader,
        sidecar: Sidecar,
        carried: CarriedTensors,
        options: ExportOptions,
        dtypes: Dtypes | None,
    ) -> None:
        self.reader, self.sidecar, self._carried, self._options = reader, sidecar, carried, options
        # Taken before anything is read, so that later changes are noticed.
        self.sources = {
            "checkpoint": describe_directory(reader.directory),
            "sidecar": describe_directory(sidecar.directory),
        }
        present = {n: i for n, i in reader.tensors.items() if n not in known_non_model_entries([n])}
        self._hf_config = self._exported_config()
        with checkpoint_named(reader.directory):
            self.plan: ModelMap = map_trained_model(
                self._hf_config, {n: t.info for n, t in sidecar.tensors.items()}, present
            )
        self.quantization_entries = find_quantization_entries(sidecar.directory / "assets", sidecar.hf_config)
        if options.vocab_size is None:
            sidecar.check_shapes(self.plan.hf_shapes)
        self._restorer = Restorer(reader, sidecar.originals())
        self.dtypes = dtypes or self._decide_dtypes()
        self.infos = self.dtypes.infos if options.fp8 is None else fp8_infos(self.dtypes.infos, options.fp8)
        self.options = {
            "dtype": options.dtype,
            "fp8": None if options.fp8 is None else described_scheme(options.fp8),
            "max_shard_bytes": options.max_shard_bytes,
            "vocab_size": options.vocab_size,
        }
        self.reopen: Opener = functools.partial(open_export, options, self.dtypes)
        self.parts: Sequence[ExportPart] = self._cut()

    def run(self, part: ExportPart, path: Path, tell: Tell) -> dict[str, Any]:
        """Write a safetensors file; see `Job`."""
        digests = Digests()
        cut: dict[str, CutRows] = {}
        with SafetensorsPart(path, {name: self.infos[name] for name in part.outputs}, digests, tell) as file:
            for mapping in part.mappings:
                for spec, tensor in zip(mapping.hf, self._restored(mapping, cut), strict=True):
                    self._write(file, spec.name, spec.index, tensor)
            for name in part.carried:
                self._write(file, name, (), self._carried.read(name))
            file.finish()
        return {"digests": digests.to_json(), "cut_rows": {n: dataclasses.asdict(rows) for n, rows in cut.items()}}

    def finish(self, staging: Staging, records: Sequence[dict[str, Any]]) -> None:
        """Write the index and the assets; see `Job`."""
        self.sidecar.copy_assets(staging.output)
        if self._options.vocab_size is not None:
            write_config(staging.output, self._hf_config)
        if self._options.fp8 is None:
            remove_quantization_entries(staging.output, self._hf_config)
        else:
            write_configs(staging.output, self._hf_config, self.infos, self._options.fp8)
        write_index(staging.output, {part.file: part.outputs for part in self.parts}, self.infos)

    def unchanged(self, records: Sequence[dict[str, Any]]) -> int:
        """Number of tensors that are equal to the source's byte for byte, from the records of the parts."""
        digests = Digests()
        for record in records:
            digests.merge(record["digests"])
        wanted = {**self.sidecar.tensors, **self.sidecar.carried}
        return sum(name in wanted and wanted[name].digest == value for name, value in digests.by_name().items())

    @staticmethod
    def cut_rows(records: Sequence[dict[str, Any]]) -> dict[str, CutRows]:
        """The rows above the vocabulary that are not zero and were not exported, from the records of the parts."""
        return {name: CutRows(**rows) for record in records for name, rows in record["cut_rows"].items()}

    def _exported_config(self) -> dict[str, Any]:
        """The source's `config.json`, with `vocab_size` from the options."""
        config, vocab_size = self.sidecar.hf_config, self._options.vocab_size
        if vocab_size is None:
            return config
        stored = [self.reader.tensors[name].shape[0] for name in PADDED_VOCABULARY if name in self.reader.tensors]
        if stored and vocab_size > min(stored):
            raise CheckpointError(
                f"{self.reader.directory}: vocab_size={vocab_size} must be at most {min(stored)}, the number of rows "
                "of the vocabulary in the checkpoint"
            )
        return with_vocab_size(config, vocab_size, find_family(config).parse(config).vocab_size)

    def _write(self, file: SafetensorsPart, name: str, index: tuple[int, ...], tensor: Tensor) -> None:
        for output, at, value in self._quantized(name, index, tensor.to(self.dtypes.infos[name].dtype)):
            file.write(output, value, at)

    def _quantized(
        self, name: str, index: tuple[int, ...], tensor: Tensor
    ) -> list[tuple[str, tuple[int, ...], Tensor]]:
        if self._options.fp8 is None:
            return [(name, index, tensor)]
        return quantize_element(name, self.dtypes.infos[name], index, tensor, self._options.fp8)

    def _restored(self, mapping: TensorMapping, cut: dict[str, CutRows]) -> tuple[Tensor, ...]:
        """The mapping's Hugging Face tensors. Rows above the vocabulary that are not zero are added to `cut`."""
        restored = self._restorer.restore(mapping)
        for name, above in restored.above_vocabulary.items():
            if (rows := nonzero_rows(above, self.plan.config.vocab_size)) is not None:
                cut[name] = rows
        return restored.hf

    def _decide_dtypes(self) -> Dtypes:
        found = decide_dtypes(self.plan.mappings, self._restorer, self.sidecar, self._options.dtype)
        if found.rounded and not self._options.allow_rounded:
            raise CheckpointError(
                f"{self.reader.directory}: these tensors were rounded, because they have fewer bits in the checkpoint "
                f"than in the source: {listing(list(found.rounded))}. Pass allow_rounded=True to export them anyway"
            )
        carried = {name: tensor.info for name, tensor in self.sidecar.carried.items()}
        return dataclasses.replace(found, infos={**found.infos, **carried})

    def _cut(self) -> list[ExportPart]:
        sources: list[tuple[list[str], list[TensorMapping], list[str]]] = [
            *((names, mappings, []) for names, mappings in _connected(self.plan.mappings)),
            *(([name], [], [name]) for name in self.sidecar.carried),
        ]
        outputs = [[output for name in names for output in self._outputs(name)] for names, _, _ in sources]
        shards = cut_into_shards(outputs, self.infos, self._options.max_shard_bytes)
        place = {output: index for index, shard in enumerate(shards) for output in shard}
        mappings: list[list[TensorMapping]] = [[] for _ in shards]
        carried: list[list[str]] = [[] for _ in shards]
        for group, (_, of_group, names) in zip(outputs, sources, strict=True):
            mappings[place[group[0]]] += of_group
            carried[place[group[0]]] += names
        return [
            ExportPart(
                file=file,
                nbytes=sum(self.infos[name].nbytes for name in shards[i]),
                outputs=shards[i],
                mappings=mappings[i],
                carried=carried[i],
            )
            for i, file in enumerate(shard_names(len(shards)))
        ]

    def _outputs(self, name: str) -> list[str]:
        """Names of the exported tensors that a tensor becomes."""
        if self._options.fp8 is None:
            return [name]
        return list(fp8_infos_of_tensor(name, self.dtypes.infos[name], self._options.fp8))


@contextlib.contextmanager
def open_export(options: ExportOptions, dtypes: Dtypes | None = None) -> Iterator[ExportJob]:
    """Open an export. It raises the errors of `export_checkpoint` before anything is written.

    Args:
        options: the arguments of `export_checkpoint`.
        dtypes: the result of `decide_dtypes` in another process, which reads tensors; None to call it here.
    """
    check_direction("export", options.megatron_dir, "megatron", f"import {options.megatron_dir} MEGATRON_DIR")
    reader = TorchDistReader(options.megatron_dir)
    sidecar = find_sidecar(options.megatron_dir, options.source)
    sidecar.check_assets()
    with sidecar.open_carried() as carried:
        yield ExportJob(reader, sidecar, carried, options, dtypes)


def _connected(mappings: Sequence[TensorMapping]) -> list[tuple[list[str], list[TensorMapping]]]:
    """(names, mappings) of groups of Hugging Face tensors that must be in one file, because they share mappings."""
    groups: list[tuple[list[str], list[TensorMapping]]] = []
    place: dict[str, int] = {}
    for mapping in mappings:
        names = list(dict.fromkeys(spec.name for spec in mapping.hf))
        known = sorted({place[name] for name in names if name in place})
        if not known:
            groups.append(([], []))
            known = [len(groups) - 1]
        into = groups[known[0]]
        for other in known[1:]:
            into[0].extend(groups[other][0])
            into[1].extend(groups[other][1])
            groups[other] = ([], [])
        into[0].extend(name for name in names if name not in place)
        into[1].append(mapping)
        place.update(dict.fromkeys(into[0], known[0]))
    return [group for group in groups if group[0]]
