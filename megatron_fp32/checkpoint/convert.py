"""Conversion between Hugging Face and Megatron: plan, stream, verify.

The plan needs headers only and refuses what would not work. It is cut into parts, one file of the output each, which
any number of processes work on; what is in memory is one mapping's tensors for each of them. Every tensor is read back
from the disk and compared with what was meant before its part counts as done, and the output gets its name when all
parts are. A conversion that was interrupted goes on where it ended.
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
    """Those that are stored as F32."""
    carried: tuple[str, ...]
    """Kept beside the checkpoint as they are, for the export."""
    left_out: tuple[str, ...]
    quantization_claims: tuple[str, ...]
    """Entries of `config.json`, and files beside it, that say how the weights are quantized, which they are not. The
    sidecar keeps them; an export leaves them out."""
    other_frequencies: tuple[str, ...]
    """Of those that are carried, stored rotary frequencies with other values than `config.json` gives. transformers
    does not read them, and neither does Megatron."""


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
    narrowed: tuple[str, ...]
    """Trained in fp32 from a 16-bit source, and rounded to its dtype, as `dtype="source"` asks."""
    rounded: tuple[str, ...]
    """Fewer bits in the Megatron checkpoint than in the source. Empty unless `allow_rounded`."""
    quantization_claims: tuple[str, ...]
    """What the source's config said of a quantization that its weights did not have, and the export does not say."""
    partial_blocks: tuple[str, ...]
    """Block-wise float8 weights with rows or columns that are no multiple of the block's: not every reader takes their
    scales as they are meant."""
    cut_rows: dict[str, CutRows]
    """Rows of Megatron's embedding and head above the vocabulary that are not zero, and were not exported."""
    cut_tokens: bool
    """They are no padding that the softmax has trained, but tokens (see `checkpoint.vocabulary`)."""


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
        text_only: `"drop"` vision and multi-token prediction.
        vision: what to do with the vision part of a vision-language model: `"refuse"` it, `"carry"` its tensors beside
            the checkpoint, from where an export takes them, or `"drop"` them.
        mtp: what to do with multi-token prediction: `"convert"`, or as above.
        max_part_bytes: a data file is closed before it grows past this, unless by one tensor alone.
        workers: how many processes convert; more than one are spawned, so a script needs `if __name__ == "__main__"`.
        progress: told of every tensor.

    Raises:
        CheckpointError: when the source is incomplete or damaged, or `out` exists. Nothing is left behind.
        OSError: such as of a full disk; what is done stays in `.NAME.partial` beside `out`, and the same call goes on
            from there.
        ValueError: when `config.json` describes a model that is not supported, parts are to be both dropped and
            carried, or an argument has a value that is not allowed.
        TypeError: for an argument of another type. Both come before anything is read.
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
            "passed with it: leave out text_only=True, or what carries them"
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
            quantization_claims=job.claims,
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

    Every tensor leaves with the dtype that it came with. One that was trained in fp32 from a 16-bit source leaves as
    F32, unless its values are still exact in the source's dtype, or `dtype` says otherwise.

    Args:
        megatron_dir: the checkpoint, or the directory whose tracker file names it.
        out: directory to make; it must not exist.
        source: what the import made, when it does not lie beside `megatron_dir`.
        allow_rounded: export tensors although the checkpoint holds fewer bits of them than the source did.
        dtype: `"source"` rounds what was trained in fp32 to the source's dtype.
        fp8: quantize the weights that this scheme names, on the way.
        vocab_size: rows of the embedding and of the head to export, which become `vocab_size` in `config.json`; at
            least the source's. None: the source's. Rows above it that are not zero are listed in `cut_rows`.
        max_shard_bytes: a file is closed before it grows past this.
        workers: see `import_checkpoint`.
        progress: told of every tensor.

    Raises:
        CheckpointError: for missing, unexpected or misshapen tensors, for rounded ones, and when there is no sidecar.
            Nothing is left behind.
        OSError: as `import_checkpoint`.
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
            quantization_claims=job.claims,
            partial_blocks=() if fp8 is None else partial_blocks(job.infos, fp8),
            cut_rows=cut_rows,
            cut_tokens=not is_padding(cut_rows, tied=job.plan.config.tie_word_embeddings),
        )
