"""`megatron-fp32 export`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from megatron_fp32.cli import options
from megatron_fp32.cli.progress import progress
from megatron_fp32.cli.report import print_claims, print_partial_blocks
from megatron_fp32.cli.terminal import console, errors_exit, print_json
from megatron_fp32.weights.choices import ExportDtype, Fp8Format

if TYPE_CHECKING:
    from megatron_fp32.checkpoint.convert import ExportReport


@click.command("export", short_help="Megatron -> Hugging Face.")
@click.argument("megatron_dir", type=options.EXISTING)
@click.argument("hf_dir", type=options.NEW)
@options.source
@click.option(
    "--allow-rounded",
    is_flag=True,
    help="Export tensors that the Megatron checkpoint stores with fewer bits than the source had. The exit status "
    "is 1.",
)
@click.option(
    "--dtype",
    type=click.Choice(get_args(ExportDtype)),
    default="trained",
    show_default=True,
    help="Dtype of parameters that were trained in fp32 from a 16-bit source. trained: F32. source: rounded to the "
    "dtype that the source has.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(1),
    help="Number of rows of the embedding and of the output layer to export. It becomes vocab_size in config.json. "
    "Default: as many as the source has. If rows above them are not zero, the export lists them; if they may be tokens "
    "that you have added, the exit status is 1.",
)
@click.option("--fp8", type=click.Choice(get_args(Fp8Format)), help="Quantize to float8 in this format.")
@click.option(
    "--fp8-like",
    type=options.EXISTING,
    help="Quantize to float8 in the format of the float8 checkpoint in this directory. Its config files are enough.",
)
@options.max_shard_bytes
@options.workers
@options.as_json
def command(
    megatron_dir: Path,
    hf_dir: Path,
    source: Path | None,
    allow_rounded: bool,
    dtype: ExportDtype,
    vocab_size: int | None,
    fp8: Fp8Format | None,
    fp8_like: Path | None,
    max_shard_bytes: int,
    workers: int,
    as_json: bool,
) -> None:
    """Convert MEGATRON_DIR, a torch_dist checkpoint, into HF_DIR: safetensors with config and tokenizer files.

    HF_DIR must not exist. A tensor is exported with the dtype that it had in the source; parameters that were trained
    in fp32 are exported as F32.
    """
    with errors_exit(1, output=hf_dir), progress() as tell:
        from megatron_fp32.checkpoint import convert

        report = convert.export_checkpoint(
            megatron_dir,
            hf_dir,
            source=source,
            allow_rounded=allow_rounded,
            dtype=dtype,
            fp8=options.chosen_scheme(fp8, fp8_like, names="--fp8 and --fp8-like"),
            vocab_size=vocab_size,
            max_shard_bytes=max_shard_bytes,
            workers=workers,
            progress=tell,
        )
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print_report(report)
    if report.rounded or (report.cut_tokens and vocab_size is None):
        sys.exit(1)


def _print_report(report: ExportReport) -> None:
    out = console()
    out.print(
        f"{report.directory}: {report.tensors} tensors, {report.nbytes:,} bytes, each read back and equal to what was "
        f"written; {report.unchanged} of them as they came from Hugging Face"
    )
    for what, names in (
        ("trained in fp32 from a 16-bit source, and exported as F32", report.widened),
        ("trained in fp32 from a 16-bit source, and rounded to its dtype, as asked", report.narrowed),
        ("rounded in the Megatron checkpoint", report.rounded),
    ):
        if names:
            out.print(f"{what}: {', '.join(names)}")
    print_claims(report.quantization_claims)
    print_partial_blocks(report.partial_blocks)
    for name, cut in report.cut_rows.items():
        out.print(f"not exported: {cut.rows} rows of {name} above the vocabulary that are not zero")
    if report.cut_rows:
        end = max(cut.end for cut in report.cut_rows.values())
        what = "They may be tokens that were added" if report.cut_tokens else "They are padding that a softmax trained"
        out.print(f"{what}. --vocab-size {end} exports them, and changes vocab_size in config.json")
