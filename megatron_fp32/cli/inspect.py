"""`megatron-fp32 inspect`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import click

from megatron_fp32.cli import options
from megatron_fp32.cli.hub import HubId, local
from megatron_fp32.cli.terminal import errors_exit, print_json


@click.command("inspect", short_help="Show what a checkpoint holds.")
@click.argument("directory", type=options.SOURCE)
@options.source
@click.option("--tensors", is_flag=True, help="List every tensor with its dtype, shape and bytes.")
@click.option("--match", metavar="GLOB", help="List the tensors with these names, such as '*.A_log'.")
@options.plot
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def command(
    directory: Path | HubId, source: Path | None, tensors: bool, match: str | None, plot: Path | None, as_json: bool
) -> None:
    """Show what the checkpoint in DIRECTORY holds: kind, family, parameters and bytes by dtype, and what is fp32.

    For a Megatron checkpoint it also shows the iteration, whether optimizer states are there, and what `import` left in
    hf_source/. Only headers are read. DIRECTORY may be the id of a repository on the Hugging Face Hub, which is fetched
    as a whole.

    Exit status: 0, or 2 for a mistake on the command line or a checkpoint that cannot be read.
    """
    with errors_exit(2):
        plots = options.plotting(plot)
        from megatron_fp32.checkpoint.inspect import inspect_checkpoint
        from megatron_fp32.cli import inspect_text

        found = inspect_checkpoint(local(directory), source=source)
    listed = {n: i for n, i in sorted(found.tensors.items()) if fnmatchcase(n, match or "*")}
    is_listing = tensors or match is not None
    if as_json:
        print_json({**found.as_json(), **({"listed": inspect_text.as_json(listed)} if is_listing else {})}, indent=1)
    else:
        inspect_text.print_inspection(found)
        if is_listing:
            inspect_text.print_tensors(listed)
    with errors_exit(2):
        if plots is not None and plot is not None:
            plots.plot_dtypes(found).savefig(plot)
