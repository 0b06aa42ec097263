"""`megatron-fp32 import`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from megatron_fp32.cli import options
from megatron_fp32.cli.hub import HubId, local
from megatron_fp32.cli.progress import progress
from megatron_fp32.cli.report import print_quantization_entries
from megatron_fp32.cli.terminal import console, errors_exit, print_json
from megatron_fp32.weights.choices import PART_BYTES, Mtp, Vision

if TYPE_CHECKING:
    from megatron_fp32.checkpoint.convert import ImportReport


@click.command("import", short_help="Hugging Face -> Megatron.")
@click.argument("hf_dir", type=options.SOURCE)
@click.argument("megatron_dir", type=options.NEW)
@click.option(
    "--vision",
    type=click.Choice(get_args(Vision)),
    default="refuse",
    show_default=True,
    help="What to do with vision tensors. refuse: stop if there are any. carry: keep them in hf_source/, from where "
    "`export` puts them back. drop: leave them out.",
)
@click.option(
    "--mtp",
    type=click.Choice(get_args(Mtp)),
    default="convert",
    show_default=True,
    help="What to do with multi-token prediction. convert: make a Megatron MTP layer of it. carry: keep its tensors in "
    "hf_source/; choose this when you train without an MTP layer. drop: leave them out.",
)
@click.option("--text-only", is_flag=True, help="Short for --vision drop --mtp drop.")
@click.option(
    "--max-part-bytes",
    type=click.IntRange(1),
    default=PART_BYTES,
    show_default=True,
    help="Largest size of a data file. A larger tensor gets a file of its own.",
)
@options.workers
@options.as_json
def command(
    hf_dir: Path | HubId,
    megatron_dir: Path,
    vision: Vision,
    mtp: Mtp,
    text_only: bool,
    max_part_bytes: int,
    workers: int,
    as_json: bool,
) -> None:
    """Convert the safetensors in HF_DIR into MEGATRON_DIR, a Megatron torch_dist checkpoint.

    HF_DIR is a directory, or the id of a repository on the Hugging Face Hub. MEGATRON_DIR must not exist. The import
    also writes the directory MEGATRON_DIR/hf_source, which `export` needs later: do not delete it.
    """
    with errors_exit(1, output=megatron_dir):
        source = local(hf_dir)
    with errors_exit(1, output=megatron_dir), progress() as tell:
        from megatron_fp32.checkpoint import convert

        report = convert.import_checkpoint(
            source,
            megatron_dir,
            text_only=text_only,
            vision=vision,
            mtp=mtp,
            max_part_bytes=max_part_bytes,
            workers=workers,
            progress=tell,
        )
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        _print_report(report)


def _print_report(report: ImportReport) -> None:
    out = console()
    out.print(
        f"{report.checkpoint}: {report.tensors} tensors, {report.nbytes:,} bytes, each read back and equal; "
        f"{len(report.fp32_tensors)} of them F32"
    )
    if report.carried:
        out.print(f"carried in hf_source/ as they are: {len(report.carried)}")
    if report.other_frequencies:
        out.print(
            "stored rotary frequencies that differ from those of config.json, which are used: "
            + ", ".join(report.other_frequencies)
        )
    if report.left_out:
        out.print(f"left out, as asked ({len(report.left_out)}):")
        for name in report.left_out:
            out.print(f"  {name}")
    print_quantization_entries(report.quantization_entries, "will be left out of exports")
