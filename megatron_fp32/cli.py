"""`megatron-fp32`: conversion between Hugging Face and Megatron checkpoints."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_fp32.checkpoint import convert
from megatron_fp32.checkpoint.huggingface import CheckpointError
from megatron_fp32.checkpoint.plan import Mtp, Vision

_EXISTING = click.Path(exists=True, file_okay=False, path_type=Path)
_NEW = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="megatron_fp32")
def main() -> None:
    """Convert checkpoints between Hugging Face and Megatron, exact in every dtype.

    Families: Qwen3.5 and Qwen3.5-MoE, alone and as the text model of a vision-language checkpoint, Qwen3-Next, Qwen3,
    Qwen3-MoE, Llama 3.

    Neither a GPU nor a process group is needed, and no model is built: one tensor at a time is in memory.

    Exit status: 0 when everything was converted and verified, 1 when it was refused or failed (nothing is left
    behind) or when `export --allow-rounded` exported rounded tensors, 2 for a mistake on the command line.
    """


@main.command("import")
@click.argument("hf_dir", type=_EXISTING)
@click.argument("megatron_dir", type=_NEW)
@click.option(
    "--vision",
    type=click.Choice(["refuse", "carry", "drop"]),
    default="refuse",
    show_default=True,
    help="Vision tensors: refuse a checkpoint that has any, carry them in hf_source/ until `export` puts them back, "
    "or drop them.",
)
@click.option(
    "--mtp",
    type=click.Choice(["convert", "carry", "drop"]),
    default="convert",
    show_default=True,
    help="Multi-token prediction: convert it into a Megatron MTP layer, or carry or drop its tensors. Carry them where "
    "the model is trained without an MTP layer.",
)
@click.option("--text-only", is_flag=True, help="The same as --vision drop --mtp drop.")
def import_(hf_dir: Path, megatron_dir: Path, vision: Vision, mtp: Mtp, text_only: bool) -> None:
    """Make MEGATRON_DIR, a torch_dist checkpoint, from the safetensors in HF_DIR.

    MEGATRON_DIR must not exist. Beside the checkpoint it holds hf_source/, which `export` needs later.
    """
    with _errors_exit(), _progress() as tell:
        report = convert.import_checkpoint(
            hf_dir, megatron_dir, text_only=text_only, vision=vision, mtp=mtp, progress=tell
        )
    console = _console()
    console.print(
        f"{report.checkpoint}: {report.tensors} tensors, {report.nbytes:,} bytes, each read back and equal; "
        f"{len(report.fp32_tensors)} of them F32"
    )
    if report.carried:
        console.print(f"carried beside the checkpoint as they are: {len(report.carried)}")
    if report.left_out:
        console.print(f"left out, as asked ({len(report.left_out)}):")
        for name in report.left_out:
            console.print(f"  {name}")


@main.command()
@click.argument("megatron_dir", type=_EXISTING)
@click.argument("hf_dir", type=_NEW)
@click.option(
    "--source", type=_EXISTING, help="What `import` made, when MEGATRON_DIR was saved by a trainer somewhere else."
)
@click.option(
    "--allow-rounded", is_flag=True, help="Export tensors of which the checkpoint holds fewer bits than the source had."
)
def export(megatron_dir: Path, hf_dir: Path, source: Path | None, allow_rounded: bool) -> None:
    """Make HF_DIR, safetensors with config and tokenizer, from the torch_dist checkpoint in MEGATRON_DIR.

    HF_DIR must not exist. Tensors leave with the dtype that they came with; those trained in fp32 leave as F32.
    """
    with _errors_exit(), _progress() as tell:
        report = convert.export_checkpoint(
            megatron_dir, hf_dir, source=source, allow_rounded=allow_rounded, progress=tell
        )
    console = _console()
    console.print(
        f"{report.directory}: {report.tensors} tensors, {report.nbytes:,} bytes, each read back and equal to what was "
        f"meant; {report.unchanged} of them as they came from Hugging Face"
    )
    if report.widened:
        console.print(f"trained in fp32 from a 16-bit source, and left as F32: {', '.join(report.widened)}")
    if report.rounded:
        console.print(f"rounded in the Megatron checkpoint: {', '.join(report.rounded)}")
        sys.exit(1)


def _console() -> Console:
    # Paths may hold brackets, which rich would take for markup.
    return Console(highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def _errors_exit() -> Iterator[None]:
    try:
        yield
    except (CheckpointError, ValueError, OSError) as error:
        click.echo(f"megatron-fp32: {error}", err=True)
        sys.exit(1)


@contextlib.contextmanager
def _progress() -> Iterator[convert.Progress]:
    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def tell(action: str, nbytes: int, total: int) -> None:
            if action not in tasks:
                tasks[action] = bars.add_task(action, total=total)
            bars.update(tasks[action], advance=nbytes)

        yield tell
