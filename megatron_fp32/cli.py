"""`megatron-fp32`: conversion between Hugging Face and Megatron checkpoints."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from megatron_fp32 import cli_compare
from megatron_fp32.checkpoint import convert
from megatron_fp32.checkpoint.fp8 import Fp8Scheme, detect_scheme, named_scheme
from megatron_fp32.checkpoint.plan import Mtp, Vision
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.errors import listing
from megatron_fp32.terminal import Commands, ExistingDirectory, console, errors_exit, progress
from megatron_fp32.weights.fp8.scheme import LAYOUTS
from megatron_fp32.weights.restore import ExportDtype

_EXISTING = ExistingDirectory()
_NEW = click.Path(path_type=Path)

_workers = click.option(
    "--workers", type=click.IntRange(1), default=1, show_default=True, help="Processes that write files at a time."
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
_shard_bytes = click.option(
    "--max-shard-bytes",
    type=click.IntRange(1),
    default=5 * 10**9,
    show_default=True,
    help="Size of a safetensors file.",
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="megatron_fp32")
def main() -> None:
    """Convert checkpoints between Hugging Face and Megatron, exact in every dtype, compare them, and look into them.

    Families: Qwen3.5 and Qwen3.5-MoE, alone and as the text model of a vision-language checkpoint, Qwen3-Next, Qwen3,
    Qwen3-MoE, Llama 3.

    The commands need neither a GPU nor a process group. They do not build the model: they stream its tensors, one at a
    time, through the memory.

    An output gets its name when all of it was written, read back and compared. Until then it grows in .NAME.partial
    beside it. After Ctrl-C, a full disk or a kill, run the same command again: it goes on from there.

    Exit status: 0 when everything was converted and verified; 1 when the conversion was refused or failed, or when
    `export` left tensors rounded (--allow-rounded) or cut added tokens off the vocabulary (see --vocab-size); 2 for a
    mistake on the command line; 130 after Ctrl-C. `verify` and `inspect` exit with 0, with 1 when something differs,
    and with 2 when a checkpoint cannot be read.
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
@_workers
@_as_json
def import_(
    hf_dir: Path, megatron_dir: Path, vision: Vision, mtp: Mtp, text_only: bool, workers: int, as_json: bool
) -> None:
    """Make MEGATRON_DIR, a torch_dist checkpoint, from the safetensors in HF_DIR.

    MEGATRON_DIR must not exist. Beside the checkpoint it holds hf_source/, which `export` needs later.
    """
    with errors_exit(1, output=megatron_dir), progress(only_on_terminals=False) as tell:
        report = convert.import_checkpoint(
            hf_dir, megatron_dir, text_only=text_only, vision=vision, mtp=mtp, workers=workers, progress=tell
        )
    if as_json:
        _print_json(report)
        return
    out = console()
    out.print(
        f"{report.checkpoint}: {report.tensors} tensors, {report.nbytes:,} bytes, each read back and equal; "
        f"{len(report.fp32_tensors)} of them F32"
    )
    if report.carried:
        out.print(f"carried beside the checkpoint as they are: {len(report.carried)}")
    if report.other_frequencies:
        out.print(
            "stored rotary frequencies that are not those of config.json, which decides: "
            + ", ".join(report.other_frequencies)
        )
    if report.left_out:
        out.print(f"left out, as asked ({len(report.left_out)}):")
        for name in report.left_out:
            out.print(f"  {name}")
    _print_claims(report.quantization_claims, "will be left out of exports")


@main.command()
@click.argument("megatron_dir", type=_EXISTING)
@click.argument("hf_dir", type=_NEW)
@click.option(
    "--source", type=_EXISTING, help="What `import` made, when MEGATRON_DIR was saved by a trainer somewhere else."
)
@click.option(
    "--allow-rounded", is_flag=True, help="Export tensors of which the checkpoint holds fewer bits than the source had."
)
@click.option(
    "--dtype",
    type=click.Choice(["trained", "source"]),
    default="trained",
    show_default=True,
    help="What was trained in fp32 from a 16-bit source leaves as F32, or rounded to the source's dtype.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(1),
    help="Rows of the embedding and of the head to export, which become vocab_size in config.json. Default: those of "
    "the source. Rows above them that are not zero are listed then; where they may be added tokens, the exit status "
    "is 1.",
)
@click.option("--fp8", "fp8_name", type=click.Choice(LAYOUTS), help="Quantize on the way, in this format.")
@click.option("--fp8-like", type=_EXISTING, help="Quantize on the way, like this float8 checkpoint or its config.")
@_shard_bytes
@_workers
@_as_json
def export(
    megatron_dir: Path,
    hf_dir: Path,
    source: Path | None,
    allow_rounded: bool,
    dtype: ExportDtype,
    vocab_size: int | None,
    fp8_name: str | None,
    fp8_like: Path | None,
    max_shard_bytes: int,
    workers: int,
    as_json: bool,
) -> None:
    """Make HF_DIR, safetensors with config and tokenizer, from the torch_dist checkpoint in MEGATRON_DIR.

    HF_DIR must not exist. Tensors leave with the dtype that they came with; those trained in fp32 leave as F32.
    """
    with errors_exit(1, output=hf_dir), progress(only_on_terminals=False) as tell:
        report = convert.export_checkpoint(
            megatron_dir,
            hf_dir,
            source=source,
            allow_rounded=allow_rounded,
            dtype=dtype,
            fp8=_scheme(fp8_name, fp8_like, names="--fp8 and --fp8-like"),
            vocab_size=vocab_size,
            max_shard_bytes=max_shard_bytes,
            workers=workers,
            progress=tell,
        )
    if as_json:
        _print_json(report)
    else:
        out = console()
        out.print(
            f"{report.directory}: {report.tensors} tensors, {report.nbytes:,} bytes, each read back and equal to what "
            f"was meant; {report.unchanged} of them as they came from Hugging Face"
        )
        for what, names in (
            ("trained in fp32 from a 16-bit source, and left as F32", report.widened),
            ("trained in fp32 from a 16-bit source, and rounded to its dtype, as asked", report.narrowed),
            ("rounded in the Megatron checkpoint", report.rounded),
        ):
            if names:
                out.print(f"{what}: {', '.join(names)}")
        _print_claims(report.quantization_claims)
        _print_partial_blocks(report.partial_blocks)
        for name, cut in report.cut_rows.items():
            out.print(f"not exported: {cut.rows} rows of {name} above the vocabulary that are not zero")
        if report.cut_rows:
            end = max(cut.end for cut in report.cut_rows.values())
            what = (
                "They may be tokens that were added" if report.cut_tokens else "They are padding that a softmax trained"
            )
            out.print(f"{what}. --vocab-size {end} exports them, and changes vocab_size in config.json")
    if report.rounded or (report.cut_tokens and vocab_size is None):
        sys.exit(1)


@main.command()
@click.argument("hf_dir", type=_EXISTING)
@click.argument("fp8_dir", type=_NEW)
@click.option("--scheme", "name", type=click.Choice(LAYOUTS), help="The format.")
@click.option("--like", type=_EXISTING, help="A float8 checkpoint, or its config files, whose format to take.")
@click.option("--device", default="cpu", show_default=True, help="Where to quantize; it does not change the result.")
@_shard_bytes
@_workers
@_as_json
def quantize(
    hf_dir: Path,
    fp8_dir: Path,
    name: str | None,
    like: Path | None,
    device: str,
    max_shard_bytes: int,
    workers: int,
    as_json: bool,
) -> None:
    """Make FP8_DIR, a float8 checkpoint for inference engines, from the 16-bit safetensors in HF_DIR.

    FP8_DIR must not exist. The large projections of the text model's layers become float8; everything else (norms,
    routers, embeddings, heads, vision towers) keeps its bytes.
    """
    with errors_exit(1, output=fp8_dir), progress(only_on_terminals=False) as tell:
        scheme = _scheme(name, like, names="--scheme and --like")
        if scheme is None:
            raise click.UsageError("one of --scheme and --like is needed")
        report = quantize_checkpoint(
            hf_dir, fp8_dir, scheme, device=device, max_shard_bytes=max_shard_bytes, workers=workers, progress=tell
        )
    if as_json:
        _print_json(report)
        return
    console().print(
        f"{report.directory}: {len(report.quantized)} weights in float8 ({report.scheme.layout}), {len(report.kept)} "
        f"tensors as they were; {report.nbytes:,} bytes of {report.source_nbytes:,}, each tensor read back and equal"
    )
    _print_claims(report.quantization_claims)
    _print_partial_blocks(report.partial_blocks)


def _print_claims(claims: tuple[str, ...], done: str = "left out") -> None:
    if claims:
        console().print(f"{done}, because the weights are not quantized as it says: {', '.join(claims)}")


def _print_partial_blocks(names: tuple[str, ...]) -> None:
    if names:
        console().print(
            f"warning: {len(names)} float8 weights have rows or columns that are no multiple of the block's, and not "
            f"every reader takes their scales as they are meant (docs/fp8.md says which): {listing(names)}"
        )


def _scheme(name: str | None, like: Path | None, *, names: str) -> Fp8Scheme | None:
    if name is not None and like is not None:
        raise click.UsageError(f"only one of {names} can be given")
    if like is not None:
        return detect_scheme(like)
    return None if name is None else named_scheme(name)


def _print_json(report: Any) -> None:
    def plain(value: Any) -> Any:
        return sorted(value) if isinstance(value, frozenset) else str(value)

    click.echo(json.dumps(dataclasses.asdict(report), default=plain))


main.add_command(cli_compare.verify)
main.add_command(cli_compare.inspect)
