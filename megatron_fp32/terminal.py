"""What the commands share: text, progress and errors on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_fp32.checkpoint import jobs
from megatron_fp32.checkpoint.huggingface import CheckpointError


def console(width: int | None = None) -> Console:
    """For text on stdout; `width` instead of the terminal's."""
    # Paths may hold brackets, which rich would take for markup.
    return Console(highlight=False, soft_wrap=True, markup=False, width=width)


@contextlib.contextmanager
def errors_exit(status: int) -> Iterator[None]:
    """What is wrong with a checkpoint becomes a message on stderr and this exit status."""
    try:
        yield
    except (CheckpointError, ValueError, OSError) as error:
        click.echo(f"megatron-fp32: {error}", err=True)
        sys.exit(status)


@contextlib.contextmanager
def progress(*, only_on_terminals: bool) -> Iterator[jobs.Progress]:
    """Bars on stderr, with throughput and the time that is left."""
    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, disable=only_on_terminals and not stderr.is_terminal) as bars:
        tasks = {}

        def tell(action: str, nbytes: int, total: int) -> None:
            if action not in tasks:
                tasks[action] = bars.add_task(action, total=total)
            bars.update(tasks[action], advance=nbytes)

        yield tell
