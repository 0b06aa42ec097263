"""What a checkpoint holds, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from megatron_fp32.checkpoint.inspect import Inspection
from megatron_fp32.cli.layers import without_numbers
from megatron_fp32.cli.terminal import wide_console
from megatron_fp32.cli.verify_text import KINDS
from megatron_fp32.weights.tensors import DTYPE_NAMES, TensorInfo


def print_inspection(found: Inspection) -> None:
    """Print everything but the list of tensors."""
    out = wide_console()
    lines = [
        ("checkpoint", f"{found.path} ({KINDS[found.kind]})"),
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
        counts = Counter(without_numbers(name) for name in found.fp32_tensors)
        out.print("F32: " + ", ".join(f"{name} ({count})" for name, count in counts.items()))


def print_tensors(tensors: Mapping[str, TensorInfo]) -> None:
    """Print a table of tensors."""
    table = _table("tensor", "dtype", "shape", "bytes")
    for name, info in tensors.items():
        table.add_row(name, DTYPE_NAMES[info.dtype], str(list(info.shape)), f"{info.nbytes:,}")
    wide_console().print(table)


def as_json(tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Dtype, shape and bytes of each tensor, for JSON."""
    return {
        name: {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape), "nbytes": info.nbytes}
        for name, info in tensors.items()
    }


def _megatron_lines(found: Inspection) -> list[tuple[str, str]]:
    details, sidecar = found.megatron, found.sidecar
    assert details is not None
    iteration = "release" if details.release else details.iteration
    return [
        ("iteration", str("unknown" if iteration is None else iteration)),
        ("optimizer", f"{_yes(details.optimizer)}; {details.other_entries} entries that are not weights"),
        ("layers", "stacked" if details.stacked_layers else "one by one"),
        (
            "hf_source",
            f"{sidecar.path}: {sidecar.tensors} tensors, {sidecar.carried} carried, {sidecar.left_out} left out"
            if sidecar
            else "none: `export` needs --source",
        ),
    ]


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for header in headers:
        table.add_column(header, overflow="fold", justify="right" if header in ("bytes", "parameters") else "left")
    return table
