"""What the commands share: text on stdout, JSON, and errors as messages and exit statuses."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from megatron_fp32.checkpoint.formats.directory_checks import staging_directory
from megatron_fp32.cli.flags import all_options, with_flags
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
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EIO: "check the disk or the network file system",
    errno.ESTALE: "check the network file system",
}
"""What to do about an error of the operating system."""

_FILE_SIZES = ("max_part_bytes", "max_shard_bytes")


class Commands(click.Group):
    """Commands that end with a message and status 130 when they are interrupted, wherever they are."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo(f"megatron-fp32: {_interrupted(None)}", err=True)
            sys.exit(INTERRUPTED)


def console(width: int | None = None) -> Console:
    """For text on stdout; `width` instead of the terminal's."""
    # Paths may hold brackets, which rich would take for markup.
    return Console(highlight=False, soft_wrap=True, markup=False, width=width)


def wide_console() -> Console:
    """For tables on stdout. A pipe has no width: names must come whole."""
    return console(width=None if sys.stdout.isatty() else 1000)


def print_json(content: dict[str, Any], *, indent: int | None = None) -> None:
    """One JSON document on stdout. Paths and dtypes become text, sets become sorted lists."""

    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, frozenset) else str(value)

    click.echo(json.dumps(content, default=plain, indent=indent, allow_nan=False))


@contextlib.contextmanager
def errors_exit(status: int, *, output: Path | None = None) -> Iterator[None]:
    """An error in the block becomes a message on stderr and an exit status; an interruption has status 130.

    Args:
        status: for a checkpoint that cannot be read or converted, for a package that is not installed, and for what
            the operating system refuses.
        output: what the command makes. The message says whether the same command can go on with it.
    """
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"megatron-fp32: {_interrupted(output)}", err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:
        click.echo(f"megatron-fp32: {_operating_system(error, output)}", err=True)
        sys.exit(status)
    except (ValueError, MissingPackageError) as error:
        click.echo(f"megatron-fp32: {in_flags(str(error))}", err=True)
        sys.exit(status)


def in_flags(message: str) -> str:
    """A message of the Python functions, with flags in the place of arguments."""
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    return with_flags(message, all_options(group))


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
            message += f". What to do: {_remedy(error.errno)}"
    # Unlike those of Path, these take any text, such as a name that is too long.
    if output is not None and not os.path.exists(output) and os.path.exists(partial := staging_directory(output)):
        message += f". What is finished stays in {partial}: run the same command again to go on from there"
    return message


def _remedy(number: int) -> str:
    params = click.get_current_context().command.params
    flags = [param.opts[0] for param in params if param.name in _FILE_SIZES]
    if number == errno.EFBIG and flags:
        return f"lower {flags[0]}, or {_REMEDIES[number]}"
    return _REMEDIES[number]
