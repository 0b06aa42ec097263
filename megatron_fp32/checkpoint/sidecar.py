"""The sidecar: the directory `hf_source/` that an import writes next to a Megatron checkpoint, and an export needs.

- `source.json`: the family, and dtype, shape and digest of every Hugging Face tensor.
- `originals/`: exact values of tensors whose conversion cannot be undone exactly.
- `carried/`: tensors that were not converted, such as the tensors of a vision part.
- `assets/`: config, tokenizer and all other files of the Hugging Face directory that do not hold weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from megatron_fp32.checkpoint.assets import assets_of, copy_files, sidecar_assets_of
from megatron_fp32.checkpoint.formats.digests import Digests, compare, digest
from megatron_fp32.checkpoint.formats.directory_checks import existing_directory, refuse_pointers
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.json_file import read_json_object
from megatron_fp32.checkpoint.formats.safetensors_writer import HuggingFaceWriter
from megatron_fp32.checkpoint.formats.torch_dist import find_checkpoint
from megatron_fp32.checkpoint.jobs.staging import Staging
from megatron_fp32.checkpoint.plan import ImportPlan
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.source_record import VERSION, SourceRecord, SourceTensor
from megatron_fp32.weights.tensors import TensorInfo

DIRECTORY = "hf_source"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sidecar(SourceRecord):
    """A sidecar: the directory `hf_source`."""

    directory: Path
    tensors: Mapping[str, SourceTensor]
    """Tensors of the source that were converted."""
    carried: Mapping[str, SourceTensor]
    """Tensors of the source that were not converted but are kept in the sidecar."""
    left_out: tuple[str, ...]
    """Names of tensors of the source that were neither converted nor kept."""

    @property
    def hf_config(self) -> dict[str, Any]:
        """The source's `config.json`, parsed."""
        path = self.directory / "assets" / "config.json"
        refuse_pointers([path])
        return read_json_object(path, finite=False)

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that `source.json` and `assets/config.json` agree about the shapes of tensors.

        Raises:
            CheckpointError: naming the file, the tensor and both shapes.
        """
        for name, source in self.tensors.items():
            if name in shapes and source.info.shape != shapes[name]:
                raise CheckpointError(
                    f"{self.directory / 'source.json'} gives {name!r} the shape {source.info.shape}, but assets/"
                    f"config.json gives it the shape {shapes[name]}: one of the two files was changed after the "
                    "import. Import the Hugging Face checkpoint again, and pass the result as source=DIR"
                )

    def originals(self) -> dict[str, Tensor]:
        """The source's tensors whose conversion cannot be undone exactly.

        Raises:
            CheckpointError: when they are damaged.
        """
        path = self.directory / "originals"
        if not path.is_dir():
            return {}
        with HuggingFaceReader(path) as reader:
            tensors = {name: reader.read(name) for name in reader.tensors}
        damaged = [n for n, t in tensors.items() if n not in self.tensors or digest(t) != self.tensors[n].digest]
        if damaged:
            raise CheckpointError(f"{path} is damaged: the values of {damaged} have changed since the import")
        return tensors

    @contextlib.contextmanager
    def open_carried(self) -> Iterator[CarriedTensors]:
        """Open the carried tensors, for reading one tensor at a time.

        Raises:
            CheckpointError: when `carried/` and `source.json` do not list the same tensors.
        """
        if not self.carried:
            if (self.directory / "carried").exists():
                raise CheckpointError(
                    f"{self.directory / 'source.json'} is damaged: it does not list the tensors in carried/"
                )
            yield CarriedTensors(self, None)
            return
        with HuggingFaceReader(self.directory / "carried") as reader:
            if reader.tensors != {name: tensor.info for name, tensor in self.carried.items()}:
                raise CheckpointError(
                    f"{reader.directory} is damaged: its tensors are not those that source.json lists"
                )
            yield CarriedTensors(self, reader)

    def copy_assets(self, directory: Path) -> None:
        """Copy the assets into `directory`.

        Raises:
            CheckpointError: see `check_assets`.
        """
        copy_files(self.directory / "assets", self.check_assets(), directory)

    def check_assets(self) -> list[PurePath]:
        """The assets, as paths relative to `assets/`.

        Raises:
            CheckpointError: when `assets/` has a file that an import never writes there, such as weights, or a link
                that leaves the directory.
        """
        return sidecar_assets_of(self.directory / "assets")


class CarriedTensors:
    """Reads the carried tensors of a sidecar."""

    def __init__(self, sidecar: Sidecar, reader: HuggingFaceReader | None) -> None:
        self._sidecar = sidecar
        self._reader = reader

    def read(self, name: str) -> Tensor:
        """Read a tensor.

        Raises:
            CheckpointError: when its values have changed since the import.
        """
        assert self._reader is not None
        tensor = self._reader.read(name)
        if digest(tensor) != self._sidecar.carried[name].digest:
            raise CheckpointError(
                f"{self._reader.directory} is damaged: the values of {name!r} have changed since the import"
            )
        return tensor


def write_sidecar(
    staging: Staging,
    reader: HuggingFaceReader,
    plan: ImportPlan,
    *,
    tensors: Mapping[str, SourceTensor],
    originals: Mapping[str, Tensor],
) -> None:
    """Write the sidecar.

    Args:
        staging: the staging directory of the import.
        reader: the reader of the Hugging Face checkpoint.
        plan: the plan of the import.
        tensors: the tensors that were converted.
        originals: exact values of tensors whose conversion cannot be undone exactly.
    """
    directory = staging.output / DIRECTORY
    # An interrupted run may have left files here.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    copy_files(reader.directory, assets_of(reader.directory), directory / "assets")
    if originals:
        infos = {n: TensorInfo(dtype=t.dtype, shape=tuple(t.shape)) for n, t in originals.items()}
        _write_tensors(directory / "originals", infos, originals.__getitem__)
    carried = {}
    if plan.carried:
        digests = Digests()

        def read(name: str) -> Tensor:
            tensor = reader.read(name)
            digests.add(name, tensor)
            return tensor

        _write_tensors(directory / "carried", {name: reader.tensors[name] for name in plan.carried}, read)
        carried = {n: SourceTensor(info=reader.tensors[n], digest=value) for n, value in digests.by_name().items()}
    record = SourceRecord(tensors=tensors, carried=carried, left_out=plan.left_out)
    content = record.to_json(family=plan.family.name)
    (directory / "source.json").write_text(json.dumps(content, indent=1) + "\n")


def _write_tensors(directory: Path, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> None:
    directory.mkdir()
    writer, digests = HuggingFaceWriter(directory, infos), {}
    for name in infos:
        tensor = read(name)
        writer.write(name, tensor)
        digests[name] = digest(tensor)
    writer.finish()
    with HuggingFaceReader(directory) as written:
        for name, expected in digests.items():
            compare(digest(written.read(name)), expected, directory, name)


def find_sidecar(megatron_dir: str | Path, source: str | Path | None = None) -> Sidecar:
    """The sidecar in `source`, or in or next to a Megatron checkpoint.

    Raises:
        CheckpointError: when there is no sidecar, or it is damaged.
    """
    if source is not None:
        existing_directory(source)
    places = [Path(source), Path(source) / DIRECTORY] if source is not None else _places(Path(megatron_dir))
    for directory in places:
        if (directory / "source.json").is_file():
            return _read_sidecar(directory)
    if source is not None:
        kind = ""
        if any((Path(source) / name).is_file() for name in ("config.json", "model.safetensors")):
            kind = (
                f" ({source} is a Hugging Face checkpoint: run megatron-fp32 import, and pass the directory that it "
                "makes)"
            )
        raise CheckpointError(
            f"{source} does not hold {DIRECTORY}: the source must be a directory that an import made, or the "
            f"{DIRECTORY} in such a directory{kind}"
        )
    raise CheckpointError(
        f"there is no {DIRECTORY} in or next to {megatron_dir}. A checkpoint that a trainer saved does not hold its "
        "Hugging Face config, tokenizer, names and dtypes: pass the directory that the import made as source=DIR"
    )


def _places(megatron_dir: Path) -> list[Path]:
    checkpoint = find_checkpoint(megatron_dir)
    return [checkpoint / DIRECTORY, checkpoint.parent / DIRECTORY]


def _read_sidecar(directory: Path) -> Sidecar:
    path = directory / "source.json"
    refuse_pointers([path])
    content = read_json_object(path)
    version = content.get("version")
    if type(version) is not int:
        raise CheckpointError(f"{path} is damaged: it has no version")
    if version != VERSION:
        raise CheckpointError(f"{path}: unknown version {version}, expected {VERSION}")
    try:
        record = SourceRecord.from_json(content)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return Sidecar(directory=directory, tensors=record.tensors, carried=record.carried, left_out=record.left_out)
