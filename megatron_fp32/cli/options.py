"""Options and arguments that several commands have."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import click

from megatron_fp32.checkpoint.formats.directory_checks import hub_hint
from megatron_fp32.cli.hub import HubId, parse_hub_id, why_not_fetched
from megatron_fp32.weights.choices import SHARD_BYTES, Fp8Format

if TYPE_CHECKING:
    from megatron_fp32.weights.fp8.scheme import Fp8Scheme


class ExistingDirectory(click.Path):
    """A directory that must exist. For the id of a Hugging Face repository, the error says how to download that."""

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The directory as a Path."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter as error:
            error.message = f"{error.message.removesuffix('.')}{self.hint(value) or '.'}"
            raise

    def hint(self, value: Any) -> str:
        """What to do about a directory that does not exist."""
        return hub_hint(value)


class HuggingFaceSource(ExistingDirectory):
    """A directory that exists, or the id of a Hugging Face repository. `hub.local` gives the directory of both."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The directory as a Path, or a HubId where no file has that name and huggingface_hub is installed."""
        if isinstance(value, HubId):
            return value
        if not os.path.lexists(value) and not _looks_local(str(value)):
            found = parse_hub_id(str(value))
            if found is not None and why_not_fetched() is None:
                return found
        return super().convert(value, param, ctx)

    def hint(self, value: Any) -> str:
        """Also how to install what downloads it."""
        hint, reason = hub_hint(value), why_not_fetched()
        return f"{hint}. Or let this command download it: {reason}" if hint and reason else hint


def _looks_local(text: str) -> bool:
    """Probably a mistyped path, not a Hub id: it ends with a slash, or the directory that it begins with exists."""
    return "://" not in text and (text.endswith("/") or os.path.isdir(text.split("/")[0]))


EXISTING = ExistingDirectory()
SOURCE = HuggingFaceSource()
NEW = click.Path(path_type=Path)

source = click.option(
    "--source",
    type=EXISTING,
    help="The directory that `import` made. Pass it for a Megatron checkpoint that a trainer saved somewhere else.",
)
workers = click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="Number of processes that write files."
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
max_shard_bytes = click.option(
    "--max-shard-bytes",
    type=click.IntRange(1),
    default=SHARD_BYTES,
    show_default=True,
    help="Largest size of a safetensors file. A larger tensor gets a file of its own.",
)
plot = click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw the result into FILE, such as out.png or out.svg; an existing file is replaced. Needs pip install "
    "'megatron_fp32[plot]'.",
)


def chosen_scheme(name: Fp8Format | None, like: Path | None, *, names: str) -> Fp8Scheme | None:
    """The float8 format that two options name: by its name, or by a checkpoint that has it. None where neither does.

    Raises:
        UsageError: where both are given.
        CheckpointError: where the checkpoint does not show its format.
    """
    if name is not None and like is not None:
        raise click.UsageError(f"pass only one of {names}")
    if like is not None:
        from megatron_fp32.checkpoint.fp8.detect import detect_scheme

        return detect_scheme(like)
    if name is None:
        return None
    from megatron_fp32.weights.fp8.scheme import named_scheme

    return named_scheme(name)


def plotting(file: Path | None) -> ModuleType | None:
    """`cli.plots` where a plot was asked for. Call it before the work: it finds out whether `file` can be written.

    Raises:
        MissingPackageError: where matplotlib is not installed.
        ValueError: for a format that matplotlib does not write, and for a directory that does not exist.
    """
    if file is None:
        return None
    from megatron_fp32.cli import plots

    plots.check_file(file)
    return plots
