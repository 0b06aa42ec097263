"""`megatron-fp32 verify`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from megatron_fp32.cli import options
from megatron_fp32.cli.hub import HubId, local
from megatron_fp32.cli.progress import progress
from megatron_fp32.cli.terminal import errors_exit, print_json


@click.command("verify", short_help="Compare two checkpoints.")
@click.argument("a", type=options.SOURCE)
@click.argument("b", type=options.SOURCE)
@options.source
@click.option("--values-only", is_flag=True, help="Exit with 0 where values are equal and only dtypes differ.")
@click.option("--text-only", is_flag=True, help="Do not compare vision and multi-token prediction.")
@click.option(
    "--vocab-size",
    type=click.IntRange(1),
    help="Do not compare rows of Megatron's embedding and output layer from this one on. Default: leave out rows above "
    "config.json's vocab_size if they are zero.",
)
@click.option(
    "--limit",
    type=click.IntRange(min=0),
    default=40,
    show_default=True,
    help="Number of differences to list; 0 lists all of them.",
)
@options.plot
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one JSON document.")
def command(
    a: Path | HubId,
    b: Path | HubId,
    source: Path | None,
    values_only: bool,
    text_only: bool,
    vocab_size: int | None,
    limit: int,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Compare the weights of A and B, and list what differs and by how much, the largest difference first.

    A and B are directories with safetensors, ids of repositories on the Hugging Face Hub, or Megatron torch_dist
    checkpoints in any sharding. Stacked layers are compared with separate ones, fused experts with separate ones, and
    the text model of a vision-language checkpoint with a text model. A Megatron checkpoint is compared with a Hugging
    Face one as `export` would write it; the directory hf_source/ is used where `import` left one. Optimizer states are
    not compared.

    Tensors are compared bit for bit: 0.0 and -0.0 differ, and NaN equals NaN with the same bits. Differences are
    |a - b| and |a - b| / max(|a|, |b|), in float64, over finite values.

    Exit status: 0 when A and B are equal, 1 when they differ, 2 for a mistake on the command line or a checkpoint that
    cannot be read (the reason is on stderr, nothing on stdout).
    """
    with errors_exit(2):
        plots = options.plotting(plot)
        directories = local(a), local(b)
    with errors_exit(2), progress() as tell:
        from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
        from megatron_fp32.cli.verify_text import print_report

        report = verify_checkpoints(
            *directories, source=source, text_only=text_only, vocab_size=vocab_size, progress=tell
        )
    agrees = report.agrees(values_only=values_only)
    if as_json:
        print_json({"agrees": agrees, "values_only": values_only, **report.as_json()}, indent=1)
    else:
        print_report(report, agrees=agrees, limit=limit)
    # After the report: a comparison may have taken hours.
    with errors_exit(2):
        if plots is not None and plot is not None:
            plots.plot_differences(report).savefig(plot)
    sys.exit(0 if agrees else 1)
