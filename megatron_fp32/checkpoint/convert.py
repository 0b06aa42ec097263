"""Conversion between Hugging Face and Megatron: plan, stream, verify.

The plan needs headers only and refuses what would not work. Streaming holds one mapping's tensors in memory. Every
tensor is then read back from the new files and compared with what was meant, and only after that does the output get
its name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.checkpoint.huggingface import (
    CheckpointError,
    HuggingFaceReader,
    HuggingFaceWriter,
    TensorInfo,
)
from megatron_fp32.checkpoint.plan import (
    PADDED_VOCABULARY,
    ImportPlan,
    Mtp,
    Plan,
    Vision,
    listing,
    plan_export,
    plan_import,
)
from megatron_fp32.checkpoint.sidecar import Digests, Sidecar, SourceTensor, digest, find_sidecar, fits, write_sidecar
from megatron_fp32.checkpoint.torch_dist import (
    TRACKER,
    TorchDistReader,
    TorchDistWriter,
    common_state,
    known_non_model_entries,
)
from megatron_fp32.models.mapping import Mapping, TensorSpec

Progress = Callable[[str, int, int], None]
"""Called after each tensor with what was done to it, its size, and the size of all tensors that it is done to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import did."""

    checkpoint: Path
    tensors: int
    """Tensors read from the Hugging Face checkpoint."""
    nbytes: int
    fp32_tensors: tuple[str, ...]
    """Those that are stored as F32."""
    carried: tuple[str, ...]
    """Kept beside the checkpoint as they are, for the export."""
    left_out: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export did."""

    directory: Path
    tensors: int
    nbytes: int
    unchanged: int
    """Tensors equal byte for byte, dtype included, to those of the source."""
    widened: tuple[str, ...]
    """Trained in fp32 from a 16-bit source, and left as F32."""
    rounded: tuple[str, ...]
    """Fewer bits in the Megatron checkpoint than in the source. Empty unless `allow_rounded`."""


def import_checkpoint(
    hf_dir: str | Path,
    out: str | Path,
    *,
    text_only: bool = False,
    vision: Vision = "refuse",
    mtp: Mtp = "convert",
    progress: Progress | None = None,
) -> ImportReport:
    """Convert a Hugging Face checkpoint into a Megatron `torch_dist` checkpoint.

    Args:
        hf_dir: directory with `config.json` and safetensors files.
        out: directory to make; it must not exist.
        text_only: `"drop"` vision and multi-token prediction, whatever the next two say.
        vision: what to do with the vision part of a vision-language model: `"refuse"` it, `"carry"` its tensors beside
            the checkpoint, from where an export takes them, or `"drop"` them.
        mtp: what to do with multi-token prediction: `"convert"`, or as above.
        progress: told of every tensor.

    Raises:
        CheckpointError: when the source is incomplete or damaged, or `out` exists. Nothing is left behind.
        ValueError: when `config.json` describes a model that is not supported.
    """
    hf_dir, out, tell = Path(hf_dir), Path(out), progress or _no_progress
    hf_config = _read_config(hf_dir)
    if text_only:
        vision = mtp = "drop"
    with HuggingFaceReader(hf_dir) as reader, _staging(out) as staging:
        with _naming(reader.directory):
            plan = plan_import(hf_config, reader.tensors, vision=vision, mtp=mtp)
        total = sum(reader.tensors[name].nbytes for name in plan.hf_shapes)
        checkpoint = staging / "release"
        checkpoint.mkdir()
        source, meant, originals = Digests(), {}, {}
        with TorchDistWriter(checkpoint) as writer:
            for mapping in plan.mappings:
                tensors = [reader.read(spec.name, spec.index) for spec in mapping.hf]
                for spec, tensor in zip(mapping.hf, tensors, strict=True):
                    source.add(spec.name, tensor, spec.index)
                    if not mapping.invertible:
                        originals[spec.name] = tensor
                for target, tensor in zip(mapping.megatron, mapping.to_megatron(tensors), strict=True):
                    writer.write(target.name, tensor, index=target.index, stack=target.stack)
                    meant[target] = digest(tensor)
                    tell("write", tensor.nbytes, total)
            for key in plan.extra_states:
                writer.write_object(key, torch.empty(0, dtype=torch.uint8))
            writer.finish(common_state(plan.megatron_args()))
        (staging / TRACKER).write_text("release")
        listed = {n: SourceTensor(info=reader.tensors[n], digest=value) for n, value in source.by_name().items()}
        write_sidecar(staging, reader, plan, tensors=listed, originals=originals)
        written = TorchDistReader(checkpoint)
        for target, expected in meant.items():
            tensor = written.read(target.name, target.index)
            _check_digest(target, tensor, expected, checkpoint)
            tell("verify", tensor.nbytes, total)
    return _import_report(out / "release", plan, listed, total)


def _import_report(checkpoint: Path, plan: ImportPlan, source: dict[str, SourceTensor], nbytes: int) -> ImportReport:
    return ImportReport(
        checkpoint=checkpoint,
        tensors=len(source),
        nbytes=nbytes,
        fp32_tensors=tuple(n for n, t in source.items() if t.info.dtype == torch.float32),
        carried=plan.carried,
        left_out=plan.left_out,
    )


def export_checkpoint(
    megatron_dir: str | Path,
    out: str | Path,
    *,
    source: str | Path | None = None,
    allow_rounded: bool = False,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress | None = None,
) -> ExportReport:
    """Convert a Megatron `torch_dist` checkpoint, trained or not, into a Hugging Face checkpoint.

    Every tensor leaves with the dtype that it came with. One that was trained in fp32 from a 16-bit source leaves as
    F32, unless its values are still exact in the source's dtype.

    Args:
        megatron_dir: the checkpoint, or the directory whose tracker file names it.
        out: directory to make; it must not exist.
        source: what the import made, when it does not lie beside `megatron_dir`.
        allow_rounded: export tensors although the checkpoint holds fewer bits of them than the source did.
        max_shard_bytes: see `HuggingFaceWriter`.
        progress: told of every tensor.

    Raises:
        CheckpointError: for missing, unexpected or misshapen tensors, for rounded ones, and when there is no sidecar.
            Nothing is left behind.
    """
    out, tell = Path(out), progress or _no_progress
    reader = TorchDistReader(megatron_dir)
    exporter = _Exporter(reader, find_sidecar(megatron_dir, source))
    infos, rounded, widened = exporter.plan_dtypes()
    if rounded and not allow_rounded:
        raise CheckpointError(
            f"{reader.directory}: these tensors were rounded, the checkpoint holds fewer bits of them than the source: "
            f"{listing(rounded)}. --allow-rounded exports them all the same"
        )
    carried = exporter.sidecar.carried
    infos |= {name: tensor.info for name, tensor in carried.items()}
    with _staging(out) as staging, exporter.sidecar.open_carried() as carried_reader:
        exporter.sidecar.copy_assets(staging)
        writer = HuggingFaceWriter(staging, infos, max_shard_bytes=max_shard_bytes)
        meant, digests = {}, Digests()
        total = sum(info.nbytes for info in infos.values())
        for mapping in exporter.plan.mappings:
            for spec, tensor in zip(mapping.hf, exporter.hf_tensors(mapping), strict=True):
                tensor = tensor.to(infos[spec.name].dtype)
                writer.write(spec.name, tensor, index=spec.index)
                meant[spec] = digests.add(spec.name, tensor, spec.index)
                tell("write", tensor.nbytes, total)
        for name in carried:
            tensor = carried_reader.read(name)
            writer.write(name, tensor)
            meant[TensorSpec(name=name, shape=tuple(tensor.shape))] = digests.add(name, tensor)
            tell("write", tensor.nbytes, total)
        writer.finish()
        with HuggingFaceReader(staging) as written:
            for spec, expected in meant.items():
                tensor = written.read(spec.name, spec.index)
                _check_digest(spec, tensor, expected, staging)
                tell("verify", tensor.nbytes, total)
    exported, wanted = digests.by_name(), {**exporter.sidecar.tensors, **carried}
    return ExportReport(
        directory=out,
        tensors=len(exported),
        nbytes=total,
        unchanged=sum(wanted[name].digest == value for name, value in exported.items()),
        widened=tuple(widened),
        rounded=tuple(rounded),
    )


def exact_hf_tensors(mapping: Mapping, megatron: Sequence[Tensor], originals: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """`mapping.to_hf`, or the originals where the Megatron tensors are still what an import made of them.

    Args:
        mapping: the tensors' mapping.
        megatron: the Megatron tensors, in the order of `mapping.megatron`.
        originals: exact Hugging Face tensors by name, for mappings that are not invertible.
    """
    names = [spec.name for spec in mapping.hf]
    if not mapping.invertible and all(name in originals for name in names):
        imported = mapping.to_megatron([originals[name] for name in names])
        if all(_same_values(a, b) for a, b in zip(imported, megatron, strict=True)):
            return tuple(originals[name] for name in names)
    return mapping.to_hf(megatron)


class _Exporter:
    """The tensors of a Megatron checkpoint in Hugging Face's layout."""

    def __init__(self, reader: TorchDistReader, sidecar: Sidecar) -> None:
        self.reader = reader
        self.sidecar = sidecar
        present = {n: i for n, i in reader.tensors.items() if n not in known_non_model_entries([n])}
        with _naming(reader.directory):
            self.plan: Plan = plan_export(sidecar.hf_config, sidecar.tensors.keys(), present)
        self._originals = sidecar.originals()

    def hf_tensors(self, mapping: Mapping) -> tuple[Tensor, ...]:
        """The mapping's Hugging Face tensors, in the dtype that the checkpoint holds (or the originals')."""
        tensors = []
        for spec in mapping.megatron:
            tensor = self.reader.read(spec.name, spec.index)
            tensors.append(tensor[: spec.shape[0]] if spec.name in PADDED_VOCABULARY else tensor)
        return exact_hf_tensors(mapping, tensors, self._originals)

    def plan_dtypes(self) -> tuple[dict[str, TensorInfo], list[str], list[str]]:
        """What every exported tensor will be, and the names of those that were rounded and of those widened."""
        infos: dict[str, TensorInfo] = {}
        rounded: dict[str, None] = {}
        widened: dict[str, None] = {}
        for mapping in self.plan.mappings:
            stored = {self.reader.tensors[spec.name].dtype for spec in mapping.megatron}
            sources = {spec.name: self.sidecar.tensors[spec.name].info for spec in mapping.hf}
            infos.update({name: info for name, info in sources.items() if name not in widened})
            if mapping.invertible and stored == {info.dtype for info in sources.values()}:
                continue
            for (name, info), tensor in zip(sources.items(), self.hf_tensors(mapping), strict=True):
                is_original = (
                    not mapping.invertible and tensor.dtype == info.dtype and tensor is self._originals.get(name)
                )
                if is_original or (torch.float32 in stored and fits(tensor, info.dtype)):
                    continue
                if stored == {torch.float32}:
                    # One element of a stack is enough to widen all of it.
                    widened[name] = None
                    infos[name] = TensorInfo(dtype=torch.float32, shape=info.shape)
                else:
                    rounded[name] = None
        return infos, list(rounded), list(widened)


def _read_config(hf_dir: Path) -> dict[str, Any]:
    path = hf_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    return content


@contextlib.contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Say in the message of a CheckpointError which checkpoint it is about."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


def _check_digest(spec: TensorSpec, tensor: Tensor, expected: str, where: Path) -> None:
    if digest(tensor) != expected:
        raise CheckpointError(f"{where}: '{spec}' reads back other values than were written; the disk may be damaged")


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` when the block ends well, and vanishes when it does not."""
    if out.exists():
        raise CheckpointError(f"{out} exists already; name a directory that does not")
    new_parents = [parent for parent in out.absolute().parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):  # somebody else has put something there
                parent.rmdir()
        raise


def _no_progress(action: str, nbytes: int, total: int) -> None:
    pass
