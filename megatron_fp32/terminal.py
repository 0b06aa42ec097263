"""What the commands share: text, progress and errors on a terminal."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_fp32.checkpoint.formats.directory import hub_hint
from megatron_fp32.checkpoint.jobs.staging import staging_directory
from megatron_fp32.checkpoint.progress import ProgressCallback
from megatron_fp32.errors import CheckpointError
from megatron_fp32.extras import MissingPackageError

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 and the number of SIGINT, as shells have it."""

_REMEDIES = {
    errno.ENOSPC: "make room on that disk",
    errno.EDQUOT: "make room in your quota on that disk",
    errno.EACCES: "give yourself permission for it, or choose another directory",
    errno.EPERM: "give yourself permission for it, or choose another directory",
    errno.EROFS: "choose a directory on a disk that can be written to",
    errno.EMFILE: "raise the limit on open files (ulimit -n), or use fewer --workers",
    errno.ENFILE: "close other programs that hold many files open, or use fewer --workers",
    errno.EFBIG: "lower --max-shard-bytes, or raise the limit on the size of a file (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk or the network file system",
    errno.ESTALE: "check the network file system",
}
"""What to do about an error of the operating system."""


class Commands(click.Group):
    """Commands that end with a message and status 130 when they are interrupted, wherever they are."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(f"megatron-fp32: {_interrupted(None)}", err=True)
            sys.exit(INTERRUPTED)


class ExistingDirectory(click.Path):
    """A directory that must exist. For the id of a Hugging Face repository, it says how to download that."""

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The directory as a Path."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            error.message = f"{error.message.removesuffix('.')}{hub_hint(value) or '.'}"
            raise


def console(width: int | None = None) -> Console:
    """For text on stdout; `width` instead of the terminal's."""
    # Paths may hold brackets, which rich would take for markup.
    return Console(highlight=False, soft_wrap=True, markup=False, width=width)


@contextlib.contextmanager
def errors_exit(status: int, *, output: Path | None = None) -> Iterator[None]:
    """What is wrong becomes a message on stderr and this exit status; an interruption has status 130.

    Args:
        status: for a checkpoint that is not what it should be, for what is not installed, and for what the operating
            system refuses.
        output: what the command makes; it can go on with what there is of it.
    """
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"megatron-fp32: {_interrupted(output)}", err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:
        click.echo(f"megatron-fp32: {_operating_system(error, output)}", err=True)
        sys.exit(status)
    except (CheckpointError, ValueError, MissingPackageError) as error:
        click.echo(f"megatron-fp32: {error}", err=True)
        sys.exit(status)


def _interrupted(output: Path | None) -> str:
    if output is None:
        return "interrupted"
    if output.exists():
        return f"interrupted when {output} was complete"
    partial = staging_directory(output)
    if partial.exists():
        return f"interrupted. What is finished stays in {partial}: run the same command again to go on from there"
    return f"interrupted before anything of {output} was written. Run the same command again to begin"


def _operating_system(error: OSError, output: Path | None) -> str:
    message = str(error)
    if error.errno is not None and error.strerror is not None:
        message = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
        if error.errno in _REMEDIES:
            message += f". What to do: {_REMEDIES[error.errno]}"
    # Unlike those of Path, these take any text, such as a name that is too long.
    if output is not None and not os.path.exists(output) and os.path.exists(partial := staging_directory(output)):
        message += f". What is finished stays in {partial}: run the same command again to go on from there"
    return message


@contextlib.contextmanager
def progress(*, only_on_terminals: bool) -> Iterator[ProgressCallback]:
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
