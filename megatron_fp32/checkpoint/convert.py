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
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_fp32.checkpoint.huggingface import (
    CheckpointError,
    HuggingFaceReader,
    HuggingFaceWriter,
    TensorInfo,
)
from megatron_fp32.checkpoint.sidecar import Sidecar, SourceTensor, digest, find_sidecar, fits, write_sidecar
from megatron_fp32.checkpoint.torch_dist import (
    TRACKER,
    TorchDistReader,
    TorchDistWriter,
    common_state,
    known_non_model_entries,
)
from megatron_fp32.models import qwen3_5
from megatron_fp32.models.mapping import Mapping

Progress = Callable[[str, int, int], None]
"""Called after each tensor with what was done to it, its size, and the size of all tensors that it is done to."""

_PADDED_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import did."""

    checkpoint: Path
    tensors: int
    """Tensors read from the Hugging Face checkpoint."""
    nbytes: int
    fp32_tensors: tuple[str, ...]
    """Those that are stored as F32."""
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
    hf_dir: str | Path, out: str | Path, *, text_only: bool = False, progress: Progress | None = None
) -> ImportReport:
    """Convert a Hugging Face checkpoint into a Megatron `torch_dist` checkpoint.

    Args:
        hf_dir: directory with `config.json` and safetensors files.
        out: directory to make; it must not exist.
        text_only: leave the vision and MTP tensors out. Without it they are refused.
        progress: told of every tensor.

    Raises:
        CheckpointError: when the source is incomplete or damaged, or `out` exists. Nothing is left behind.
        ValueError: when `config.json` describes a model that is not supported.
    """
    hf_dir, out, tell = Path(hf_dir), Path(out), progress or _no_progress
    config = _family_config(hf_dir)
    with HuggingFaceReader(hf_dir) as reader, _staging(out) as staging:
        left_out = _left_out(reader, text_only=text_only)
        prefix = qwen3_5.find_prefix(reader.tensors)
        plan = list(qwen3_5.mappings(config, prefix))
        _check_hf(reader, plan, left_out)

        checkpoint = staging / "release"
        checkpoint.mkdir()
        source, meant, originals = {}, {}, {}
        total = sum(reader.tensors[spec.name].nbytes for mapping in plan for spec in mapping.hf)
        with TorchDistWriter(checkpoint) as writer:
            for mapping in plan:
                tensors = [reader.read(spec.name) for spec in mapping.hf]
                for spec, tensor in zip(mapping.hf, tensors, strict=True):
                    source[spec.name] = SourceTensor(info=reader.tensors[spec.name], digest=digest(tensor))
                    if not mapping.invertible:
                        originals[spec.name] = tensor
                for target, tensor in zip(mapping.megatron, mapping.to_megatron(tensors), strict=True):
                    writer.write(target.name, tensor)
                    meant[target.name] = digest(tensor)
                    tell("write", tensor.nbytes, total)
            for module in qwen3_5.extra_state_keys(config):
                writer.write_object(f"{module}_extra_state/shard_0_1", torch.empty(0, dtype=torch.uint8))
            writer.finish(common_state(_megatron_args(config)))
        (staging / TRACKER).write_text("release")
        write_sidecar(staging, hf_dir, prefix=prefix, tensors=source, left_out=left_out, originals=originals)
        written = TorchDistReader(checkpoint)
        for name, expected in meant.items():
            tensor = written.read(name)
            _check_digest(name, tensor, expected, checkpoint)
            tell("verify", tensor.nbytes, total)
    return ImportReport(
        checkpoint=out / "release",
        tensors=len(source),
        nbytes=total,
        fp32_tensors=tuple(n for n, t in source.items() if t.info.dtype == torch.float32),
        left_out=left_out,
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
    exporter.check()
    infos, rounded, widened = exporter.plan_dtypes()
    if rounded and not allow_rounded:
        raise CheckpointError(
            f"{reader.directory}: these tensors were rounded, the checkpoint holds fewer bits of them than the source: "
            f"{_listing(rounded)}. --allow-rounded exports them all the same"
        )
    with _staging(out) as staging:
        exporter.sidecar.copy_assets(staging)
        writer = HuggingFaceWriter(staging, infos, max_shard_bytes=max_shard_bytes)
        meant = {}
        total = sum(info.nbytes for info in infos.values())
        for mapping in exporter.mappings:
            for spec, tensor in zip(mapping.hf, exporter.hf_tensors(mapping), strict=True):
                tensor = tensor.to(infos[spec.name].dtype)
                writer.write(spec.name, tensor)
                meant[spec.name] = digest(tensor)
                tell("write", tensor.nbytes, total)
        writer.finish()
        with HuggingFaceReader(staging) as written:
            for name, expected in meant.items():
                tensor = written.read(name)
                _check_digest(name, tensor, expected, staging)
                tell("verify", tensor.nbytes, total)
    return ExportReport(
        directory=out,
        tensors=len(meant),
        nbytes=total,
        unchanged=sum(exporter.sidecar.tensors[name].digest == value for name, value in meant.items()),
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
        self.config = qwen3_5.Qwen35Config.from_hf(sidecar.hf_config)
        self.mappings = list(qwen3_5.mappings(self.config, sidecar.prefix))
        self._originals = sidecar.originals()

    def check(self) -> None:
        """Raise CheckpointError unless the checkpoint holds exactly the model's tensors, in their shapes."""
        wanted = {spec.name: spec.shape for mapping in self.mappings for spec in mapping.megatron}
        present = {n: i for n, i in self.reader.tensors.items() if n not in known_non_model_entries([n])}
        problems = _problems(
            missing=wanted.keys() - present.keys(),
            unexpected=present.keys() - wanted.keys(),
            misshapen=[
                f"{name} {present[name].shape} (expected {shape})"
                for name, shape in wanted.items()
                if name in present and not _shape_fits(name, present[name].shape, shape)
            ],
        )
        unknown = {spec.name for mapping in self.mappings for spec in mapping.hf} ^ self.sidecar.tensors.keys()
        if unknown:
            problems.append(f"not the same tensors as in {self.sidecar.directory}: {_listing(sorted(unknown))}")
        if problems:
            raise CheckpointError(f"{self.reader.directory} is not the model that was imported: " + "; ".join(problems))

    def hf_tensors(self, mapping: Mapping) -> tuple[Tensor, ...]:
        """The mapping's Hugging Face tensors, in the dtype that the checkpoint holds (or the originals')."""
        tensors = []
        for spec in mapping.megatron:
            tensor = self.reader.read(spec.name)
            tensors.append(tensor[: spec.shape[0]] if spec.name in _PADDED_VOCABULARY else tensor)
        return exact_hf_tensors(mapping, tensors, self._originals)

    def plan_dtypes(self) -> tuple[dict[str, TensorInfo], list[str], list[str]]:
        """What every exported tensor will be, and the names of those that were rounded and of those widened."""
        infos: dict[str, TensorInfo] = {}
        rounded: list[str] = []
        widened: list[str] = []
        for mapping in self.mappings:
            stored = {self.reader.tensors[spec.name].dtype for spec in mapping.megatron}
            sources = {spec.name: self.sidecar.tensors[spec.name].info for spec in mapping.hf}
            if mapping.invertible and stored == {info.dtype for info in sources.values()}:
                infos.update(sources)
                continue
            for (name, info), tensor in zip(sources.items(), self.hf_tensors(mapping), strict=True):
                is_original = (
                    not mapping.invertible and tensor.dtype == info.dtype and tensor is self._originals.get(name)
                )
                if is_original or (torch.float32 in stored and fits(tensor, info.dtype)):
                    infos[name] = info
                elif stored == {torch.float32}:
                    widened.append(name)
                    infos[name] = TensorInfo(dtype=torch.float32, shape=info.shape)
                else:
                    rounded.append(name)
                    infos[name] = info
        return infos, rounded, widened


def _family_config(hf_dir: Path) -> qwen3_5.Qwen35Config:
    path = hf_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    return qwen3_5.Qwen35Config.from_hf(content)


def _left_out(reader: HuggingFaceReader, *, text_only: bool) -> tuple[str, ...]:
    outside = tuple(name for name in reader.tensors if name.startswith(tuple(qwen3_5.SKIPPABLE.values())))
    if outside and not text_only:
        parts = [part for part, start in qwen3_5.SKIPPABLE.items() if any(n.startswith(start) for n in outside)]
        raise CheckpointError(
            f"{reader.directory} has {len(outside)} tensors of its {' and '.join(parts)} part, which cannot be "
            f"converted: {_listing(outside)}. --text-only leaves them out"
        )
    return outside


def _check_hf(reader: HuggingFaceReader, plan: Sequence[Mapping], left_out: Sequence[str]) -> None:
    wanted = {spec.name: spec.shape for mapping in plan for spec in mapping.hf}
    present = reader.tensors.keys() - set(left_out)
    problems = _problems(
        missing=wanted.keys() - present,
        unexpected=present - wanted.keys(),
        misshapen=[
            f"{name} {reader.tensors[name].shape} (expected {shape})"
            for name, shape in wanted.items()
            if name in present and reader.tensors[name].shape != shape
        ],
    )
    for mapping in plan:
        dtypes = {reader.tensors[s.name].dtype for s in mapping.hf if s.name in present}
        names = [spec.name for spec in mapping.hf]
        if len(dtypes) > 1:
            problems.append(
                f"one Megatron tensor cannot hold the dtypes {_listing(sorted(map(str, dtypes)))} of {names}"
            )
        problems.extend(
            f"{names} are {dtype}; expected a floating-point dtype of 16 bits or more"
            for dtype in dtypes
            if not dtype.is_floating_point or dtype.itemsize < 2
        )
    if problems:
        raise CheckpointError(f"{reader.directory} does not match its config.json: " + "; ".join(problems))


def _problems(*, missing: set[str], unexpected: set[str], misshapen: list[str]) -> list[str]:
    listed = {"missing": sorted(missing), "unexpected": sorted(unexpected), "misshapen": misshapen}
    return [f"{len(names)} {kind} tensors: {_listing(names)}" for kind, names in listed.items() if names]


def _shape_fits(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    if name in _PADDED_VOCABULARY:
        return len(shape) == 2 and shape[0] >= expected[0] and shape[1:] == expected[1:]
    return shape == expected


def _same_values(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float().view(torch.int32), b.float().view(torch.int32))


def _megatron_args(config: qwen3_5.Qwen35Config) -> Namespace:
    """What Megatron compares between a checkpoint and its command line (megatron/training/checkpointing.py)."""
    return Namespace(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
    )


def _check_digest(name: str, tensor: Tensor, expected: str, where: Path) -> None:
    if digest(tensor) != expected:
        raise CheckpointError(f"{where}: {name!r} reads back other values than were written; the disk may be damaged")


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


def _listing(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"


def _no_progress(action: str, nbytes: int, total: int) -> None:
    pass
