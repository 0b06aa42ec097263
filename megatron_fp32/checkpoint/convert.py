"""Conversion between Hugging Face and Megatron checkpoints.

- The plan only reads headers, and refuses checkpoints that cannot be converted.
- The work is cut into parts. Each part is one file of the output. Several processes can work on parts; each process has
  the tensors of one mapping in memory.
- Every tensor is read back from the disk and compared by digest before its part counts as done.
- The output is renamed to its final name when all parts are done.
- The same call resumes a conversion that was interrupted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import torch

from megatron_fp32.checkpoint.jobs.export_job import ExportOptions, open_export
from megatron_fp32.checkpoint.jobs.import_job import RELEASE, open_import
from megatron_fp32.checkpoint.jobs.run import run_job
from megatron_fp32.checkpoint.jobs.staging import check_output
from megatron_fp32.checkpoint.progress import ProgressCallback
from megatron_fp32.validation import check_callable, check_choice, check_count, check_flag, check_path
from megatron_fp32.weights.choices import PART_BYTES, SHARD_BYTES, ExportDtype, Mtp, Vision
from megatron_fp32.weights.fp8.scheme import Fp8Scheme
from megatron_fp32.weights.fp8.tensors import partial_blocks
from megatron_fp32.weights.vocabulary import CutRows, check_vocab_size, is_padding


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import did."""

    checkpoint: Path
    tensors: int
    """Tensors read from the Hugging Face checkpoint."""
    nbytes: int
    fp32_tensors: tuple[str, ...]
    """Names of the tensors that are F32."""
    carried: tuple[str, ...]
    """Names of the tensors that were not converted but are kept in the sidecar, for an export."""
    left_out: tuple[str, ...]
    """Names of the tensors that were neither converted nor kept."""
    quantization_entries: tuple[str, ...]
    """Entries of `config.json`, and files next to it, that say that the weights are quantized, although they are not.
    The sidecar keeps them; an export leaves them out."""
    other_frequencies: tuple[str, ...]
    """Names of carried tensors with rotary frequencies that differ from those in `config.json`. Neither transformers
    nor Megatron reads such tensors."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export did."""

    directory: Path
    tensors: int
    nbytes: int
    unchanged: int
    """Number of tensors that are equal to the source's, byte for byte and in dtype."""
    widened: tuple[str, ...]
    """Tensors that were trained in fp32 from a 16-bit source and are exported as F32."""
    narrowed: tuple[str, ...]
    """Tensors that were trained in fp32 from a 16-bit source and are rounded to its dtype, because of
    `dtype="source"`."""
    rounded: tuple[str, ...]
    """Tensors with fewer bits in the Megatron checkpoint than in the source. Empty unless `allow_rounded`."""
    quantization_entries: tuple[str, ...]
    """Entries and files of the source that say that its weights are quantized, although they are not. The export does
    not have them."""
    partial_blocks: tuple[str, ...]
    """Block-wise float8 weights whose rows or columns are not a multiple of the block's. Some readers get the scales of
    such weights wrong."""
    cut_rows: dict[str, CutRows]
    """For each Megatron tensor, its rows above the vocabulary that are not zero. They were not exported."""
    cut_tokens: bool
    """`cut_rows` cannot be padding rows, so they are tokens; see `weights.vocabulary`."""


def import_checkpoint(
    hf_dir: str | Path,
    out: str | Path,
    *,
    text_only: bool = False,
    vision: Vision = "refuse",
    mtp: Mtp = "convert",
    max_part_bytes: int = PART_BYTES,
    workers: int = 1,
    progress: ProgressCallback | None = None,
) -> ImportReport:
    """Convert a Hugging Face checkpoint into a Megatron `torch_dist` checkpoint.

    Args:
        hf_dir: directory with `config.json` and safetensors files.
        out: directory to make; it must not exist.
        text_only: leave out the vision part and multi-token prediction: `vision="drop"` and `mtp="drop"`.
        vision: what to do with the tensors of a vision part: `"refuse"` the checkpoint, `"carry"` them in the sidecar
            for an export, or `"drop"` them.
        mtp: what to do with the tensors of multi-token prediction: `"convert"` them to a Megatron MTP layer, `"carry"`
            or `"drop"` them.
        max_part_bytes: most bytes of tensors in a data file. A larger tensor gets a file of its own.
        workers: number of processes. With more than one, processes are spawned, so a script needs
            `if __name__ == "__main__"`.
        progress: called after every tensor; see `ProgressCallback`.

    Raises:
        CheckpointError: when the source is incomplete or damaged, or `out` exists. No output is left.
        OSError: for example when the disk is full. Finished parts stay in `.NAME.partial` next to `out`, and the same
            call resumes from there.
        ValueError: when `config.json` describes a model that is not supported, when `text_only` contradicts `vision` or
            `mtp`, or when an argument has a value that is not allowed.
        TypeError: for an argument of another type. Arguments are checked before any file is read.
    """
    check_path("hf_dir", hf_dir)
    check_path("out", out)
    check_flag("text_only", text_only)
    check_choice("vision", vision, get_args(Vision))
    check_choice("mtp", mtp, get_args(Mtp))
    check_count("max_part_bytes", max_part_bytes)
    check_count("workers", workers)
    check_callable("progress", progress)
    if text_only and "carry" in (vision, mtp):
        raise ValueError(
            f"text_only=True drops vision and multi-token prediction, but vision={vision!r} and mtp={mtp!r} were "
            "passed, too: leave out text_only=True or the argument with 'carry'"
        )
    if text_only:
        vision = mtp = "drop"
    out = Path(out)
    check_output(out)
    with open_import(Path(hf_dir), vision, mtp, max_part_bytes) as job:
        records = run_job(job, out, workers=workers, progress=progress)
        source = job.source(records)
        return ImportReport(
            checkpoint=out / RELEASE,
            tensors=len(source),
            nbytes=sum(tensor.info.nbytes for tensor in source.values()),
            fp32_tensors=tuple(n for n, t in source.items() if t.info.dtype == torch.float32),
            carried=job.plan.carried,
            left_out=job.plan.left_out,
            quantization_entries=job.quantization_entries,
            other_frequencies=job.other_frequencies(),
        )


def export_checkpoint(
    megatron_dir: str | Path,
    out: str | Path,
    *,
    source: str | Path | None = None,
    allow_rounded: bool = False,
    dtype: ExportDtype = "trained",
    fp8: Fp8Scheme | None = None,
    vocab_size: int | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    workers: int = 1,
    progress: ProgressCallback | None = None,
) -> ExportReport:
    """Convert a Megatron `torch_dist` checkpoint, trained or not, into a Hugging Face checkpoint.

    Every tensor is exported with its dtype in the source. A tensor that was trained in fp32 from a 16-bit source is
    exported as F32, unless its values are still exact in the source's dtype or `dtype="source"`.

    Args:
        megatron_dir: the checkpoint, or the directory whose tracker file names it.
        out: directory to make; it must not exist.
        source: the directory that the import made, if there is no sidecar next to `megatron_dir`.
        allow_rounded: also export tensors that have fewer bits in the checkpoint than in the source.
        dtype: `"source"` rounds tensors that were trained in fp32 to the source's dtype.
        fp8: quantize the weights during the export, in this format.
        vocab_size: rows of the embedding and of the head to export. It becomes `vocab_size` in `config.json`, and must
            be at least the source's, which None means. Rows above it that are not zero are listed in `cut_rows`.
        max_shard_bytes: most bytes of tensors in a file. A larger tensor gets a file of its own.
        workers: see `import_checkpoint`.
        progress: called after every tensor; see `ProgressCallback`.

    Raises:
        CheckpointError: for missing, unexpected, misshapen or rounded tensors, and when there is no sidecar. No output
            is left.
        OSError: see `import_checkpoint`.
        ValueError: for an argument with a value that is not allowed, and for infinite or NaN weights that are to be
            quantized.
        TypeError: for an argument of another type.
    """
    check_path("megatron_dir", megatron_dir)
    check_path("out", out)
    check_path("source", source, optional=True)
    check_flag("allow_rounded", allow_rounded)
    check_choice("dtype", dtype, get_args(ExportDtype))
    if fp8 is not None and not isinstance(fp8, Fp8Scheme):
        raise TypeError(f"fp8 must be an Fp8Scheme, such as named_scheme('blockwise'), or None, got {fp8!r}")
    check_vocab_size(vocab_size)
    check_count("max_shard_bytes", max_shard_bytes)
    check_count("workers", workers)
    check_callable("progress", progress)
    out = Path(out)
    check_output(out)
    options = ExportOptions(
        megatron_dir=Path(megatron_dir),
        source=None if source is None else Path(source),
        allow_rounded=allow_rounded,
        dtype=dtype,
        fp8=fp8,
        max_shard_bytes=max_shard_bytes,
        vocab_size=vocab_size,
    )
    with open_export(options) as job:
        records = run_job(job, out, workers=workers, progress=progress)
        widened = job.dtypes.widened
        cut_rows = job.cut_rows(records)
        return ExportReport(
            directory=out,
            tensors=len(job.infos),
            nbytes=sum(info.nbytes for info in job.infos.values()),
            unchanged=job.unchanged(records),
            widened=widened if dtype == "trained" else (),
            narrowed=widened if dtype == "source" else (),
            rounded=job.dtypes.rounded,
            quantization_entries=job.quantization_entries,
            partial_blocks=() if fp8 is None else partial_blocks(job.infos, fp8),
            cut_rows=cut_rows,
            cut_tokens=not is_padding(cut_rows, tied=job.plan.config.tie_word_embeddings),
        )
