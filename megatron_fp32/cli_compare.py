"""`megatron-fp32 verify` and `megatron-fp32 inspect`."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from megatron_fp32.checkpoint.compare.difference import Largest, ValueDifference
from megatron_fp32.checkpoint.compare.findings import TensorDifference, VerifiedSide, VerifyReport
from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
from megatron_fp32.checkpoint.inspect import Inspection, inspect_checkpoint
from megatron_fp32.terminal import ExistingDirectory, console, errors_exit, progress
from megatron_fp32.weights.tensors import DTYPE_NAMES, TensorInfo

_EXISTING = ExistingDirectory()

_MEANINGS = {
    "only_a": "only in A",
    "only_b": "only in B",
    "shape": "other shape",
    "values": "other values",
    "dtype": "same values, other dtype",
}

_KINDS = {"huggingface": "Hugging Face", "megatron": "Megatron"}


@click.command()
@click.argument("a", type=_EXISTING)
@click.argument("b", type=_EXISTING)
@click.option(
    "--source", type=_EXISTING, help="What `import` made, for a Megatron checkpoint that a trainer saved elsewhere."
)
@click.option("--values-only", is_flag=True, help="Accept another dtype where every value is the same: exit with 0.")
@click.option("--text-only", is_flag=True, help="Leave vision and multi-token prediction out on both sides.")
@click.option(
    "--vocab-size",
    type=click.IntRange(1),
    help="Take rows of Megatron's embedding and head from here on for padding, whatever they hold. Default: rows above "
    "config.json's vocab_size, where they are zero.",
)
@click.option(
    "--limit", type=click.IntRange(min=0), default=40, show_default=True, help="Differences to list; 0 for all."
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as one JSON document.")
def verify(
    a: Path,
    b: Path,
    source: Path | None,
    values_only: bool,
    text_only: bool,
    vocab_size: int | None,
    limit: int,
    as_json: bool,
) -> None:
    """Compare the weights of A and B, and list what differs and by how much.

    Each is a directory with safetensors or a Megatron torch_dist checkpoint, in any sharding; stacked layers are
    compared with separate ones, fused experts with separate ones, and the text model of a vision-language checkpoint
    with one that stands alone. A Megatron checkpoint beside a Hugging Face one is taken as `export` would write it,
    with the sidecar (hf_source/) where there is one. Optimizer states are not compared.

    Tensors are compared bit for bit: 0.0 and -0.0 differ, and NaN equals NaN with the same bits. Differences are
    |a - b| and |a - b| / max(|a|, |b|), in float64, over finite values.

    Exit status: 0 when A and B are equal, 1 when they differ, 2 for a mistake on the command line or a checkpoint that
    cannot be read (the reason is on stderr, nothing on stdout).
    """
    with errors_exit(2), progress(only_on_terminals=True) as tell:
        report = verify_checkpoints(a, b, source=source, text_only=text_only, vocab_size=vocab_size, progress=tell)
    agrees = report.agrees(values_only=values_only)
    if as_json:
        _print_json({"agrees": agrees, "values_only": values_only, **report.as_json()})
    else:
        _print_report(report, agrees, limit)
    sys.exit(0 if agrees else 1)


@click.command()
@click.argument("directory", type=_EXISTING)
@click.option(
    "--source", type=_EXISTING, help="What `import` made, for a Megatron checkpoint that a trainer saved elsewhere."
)
@click.option("--tensors", is_flag=True, help="List every tensor with dtype, shape and bytes.")
@click.option("--match", metavar="GLOB", help="List the tensors of these names, such as '*.A_log'.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(directory: Path, source: Path | None, tensors: bool, match: str | None, as_json: bool) -> None:
    """Say what the checkpoint in DIRECTORY holds: kind, family, parameters and bytes by dtype, what is fp32.

    Of a Megatron checkpoint also the iteration, whether optimizer states are there, and what `import` left beside it.
    Headers are read, no tensor is.

    Exit status: 0, or 2 for a mistake on the command line or a checkpoint that cannot be read.
    """
    with errors_exit(2):
        found = inspect_checkpoint(directory, source=source)
    listed = {n: i for n, i in sorted(found.tensors.items()) if fnmatchcase(n, match or "*")}
    is_listing = tensors or match is not None
    if as_json:
        content = found.as_json()
        if is_listing:
            content["listed"] = {
                n: {"dtype": DTYPE_NAMES[i.dtype], "shape": list(i.shape), "nbytes": i.nbytes}
                for n, i in listed.items()
            }
        _print_json(content)
    else:
        _print_inspection(found)
        if is_listing:
            _print_tensors(listed)


def _print_report(report: VerifyReport, agrees: bool, limit: int) -> None:
    out = _wide_console()
    for label, side in (("A", report.a), ("B", report.b)):
        out.print(f"{label}: {_side(side)}")
    shown = _largest_first(report)
    shown = shown[:limit] if limit else shown
    if shown:
        table = _table("tensor", "what", "dtype", "shape")
        for header in ("differ", "largest |a - b|", "at", "largest relative", "NaN a/b", "inf a/b", "note"):
            table.add_column(header, overflow="fold", justify="left" if header in ("at", "note") else "right")
        for difference in shown:
            table.add_row(*_row(difference))
        out.print(table)
    if len(shown) < len(report.differences):
        out.print(f"and {len(report.differences) - len(shown)} more; --limit 0 lists all of them")
    if report.names_only:
        out.print(f"compared by name alone, other layouts were not paired: {report.names_only}")
    counts = {status: sum(d.status == status for d in report.differences) for status in _MEANINGS}
    listed = "".join(f"; {_MEANINGS[status]}: {count}" for status, count in counts.items() if count)
    out.print(f"{'equal' if agrees else 'DIFFERENT'}: {report.equal} of {report.compared} byte for byte{listed}")


def _side(side: VerifiedSide) -> str:
    parts = [f"{side.path}: {_KINDS[side.kind]}, {side.tensors} tensors"]
    if side.carried:
        parts.append(f"{side.carried} carried in the sidecar")
    if side.left_out:
        parts.append(f"{len(side.left_out)} left out as asked")
    if side.ignored:
        parts.append(f"{side.ignored} entries that are no weights ignored")
    parts.extend(f"{rows} padding rows of {name} cut" for name, rows in side.padding.items())
    return ", ".join(parts)


def _largest_first(report: VerifyReport) -> list[TensorDifference]:
    order = list(_MEANINGS)

    def key(difference: TensorDifference) -> tuple[int, float]:
        values = difference.values
        size = values.relative.size if values and values.relative else 0.0
        return order.index(difference.status), -size

    return sorted(report.differences, key=key)


def _row(difference: TensorDifference) -> list[str]:
    infos = [info for info in (difference.a, difference.b) if info]
    row = [
        difference.name,
        _MEANINGS[difference.status],
        " / ".join(dict.fromkeys(DTYPE_NAMES[info.dtype] for info in infos)),
        " / ".join(dict.fromkeys(str(list(info.shape)) for info in infos)),
    ]
    values = difference.values
    if values is None:
        return [*row, "", "", "", "", "", "", difference.note]
    largest = values.absolute
    return [
        *row,
        f"{values.count:,} of {values.total:,}",
        _size(values.absolute),
        f"{list(largest.index)}: {largest.a:.9g} / {largest.b:.9g}" if largest else _first(values),
        _size(values.relative),
        _counts(values.nan),
        _counts(values.infinite),
        difference.note,
    ]


def _first(values: ValueDifference) -> str:
    return f"{list(values.first)}" if values.first is not None else ""


def _size(largest: Largest | None) -> str:
    return f"{largest.size:.4g}" if largest else ""


def _counts(counts: tuple[int, int]) -> str:
    return f"{counts[0]}/{counts[1]}" if any(counts) else ""


def _print_inspection(found: Inspection) -> None:
    out = _wide_console()
    lines = [
        ("checkpoint", f"{found.path} ({_KINDS[found.kind]})"),
        ("family", f"{found.family or 'unknown'} (model_type {found.model_type or 'unknown'})"),
        ("parameters", f"{found.parameters:,} in {len(found.tensors):,} tensors, {found.nbytes:,} bytes"),
        ("MTP", _yes(found.multi_token_prediction)),
        ("vision", _yes(found.vision)),
    ]
    if found.float8:
        lines.append(("float8", found.float8))
    if found.adapter:
        lines.append(("adapter", f"{', '.join(found.adapter)}; transformers adds it to the weights"))
    if found.megatron:
        lines += _megatron_lines(found)
    lines.append(("files", f"{len(found.files)}, {sum(found.files.values()):,} bytes"))
    for label, text in lines:
        out.print(f"{label:>12}  {text}")
    table = _table("dtype", "tensors", "parameters", "bytes")
    for dtype, total in found.by_dtype.items():
        table.add_row(DTYPE_NAMES[dtype], f"{total.tensors:,}", f"{total.parameters:,}", f"{total.nbytes:,}")
    out.print(table)
    if 0 < len(found.fp32_tensors) < len(found.tensors):
        out.print("F32: " + ", ".join(_by_layer(found.fp32_tensors)))


def _by_layer(names: tuple[str, ...]) -> list[str]:
    """Names that differ in numbers only, once: `decoder.layers.*.self_attention.A_log (24)`."""
    counts = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names)
    return [f"{name} ({count})" for name, count in counts.items()]


def _megatron_lines(found: Inspection) -> list[tuple[str, str]]:
    details, sidecar = found.megatron, found.sidecar
    assert details is not None
    iteration = "release" if details.release else details.iteration
    return [
        ("iteration", str("unknown" if iteration is None else iteration)),
        ("optimizer", f"{_yes(details.optimizer)}; {details.other_entries} entries that are no weights"),
        ("layers", "stacked" if details.stacked_layers else "one by one"),
        (
            "sidecar",
            f"{sidecar.path}: {sidecar.tensors} tensors, {sidecar.carried} carried, {sidecar.left_out} left out"
            if sidecar
            else "none: `export` needs --source",
        ),
    ]


def _print_tensors(tensors: dict[str, TensorInfo]) -> None:
    table = _table("tensor", "dtype", "shape", "bytes")
    for name, info in tensors.items():
        table.add_row(name, DTYPE_NAMES[info.dtype], str(list(info.shape)), f"{info.nbytes:,}")
    _wide_console().print(table)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold", justify="right" if header in ("bytes", "parameters") else "left")
    return table


def _wide_console() -> Console:
    # A pipe has no width: names must come whole.
    return console(width=None if sys.stdout.isatty() else 1000)


def _print_json(content: dict[str, Any]) -> None:
    click.echo(json.dumps(content, indent=1, allow_nan=False))
