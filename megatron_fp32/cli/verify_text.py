"""A comparison as text: what differs, the largest difference first, and a summary by layer. 80 columns are enough."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections.abc import Iterator, Sequence

from megatron_fp32.checkpoint.compare.findings import TensorDifference, VerifiedSide, VerifyReport
from megatron_fp32.cli.layers import NO_LAYER, Layer, split_name
from megatron_fp32.cli.terminal import console, in_flags
from megatron_fp32.weights.tensors import DTYPE_NAMES

MEANINGS = {
    "only_a": "only in A",
    "only_b": "only in B",
    "shape": "other shape",
    "values": "other values",
    "dtype": "same values, other dtype",
}
"""What each status means, the worst first."""

_IN_SUMMARY = {**MEANINGS, "values": "", "dtype": "other dtype"}

KINDS = {"huggingface": "Hugging Face", "megatron": "Megatron"}

_WIDTH = 80
"""Columns where stdout is not a terminal."""


def print_report(report: VerifyReport, *, agrees: bool, limit: int) -> None:
    """Print a comparison.

    Args:
        report: what was found.
        agrees: the verdict, which the last line gives.
        limit: number of differences to list; 0 for all.
    """
    out = console()
    width = out.width if sys.stdout.isatty() else _WIDTH
    for label, side in (("A", report.a), ("B", report.b)):
        out.print(f"{label}: {side.path}: {', '.join(_side(side))}")
    ordered = worst_first(report.differences)
    shown = ordered[:limit] if limit else ordered
    for difference in shown:
        # The name has a line of its own, and is never broken: it can be searched for and copied.
        out.print(f"\n{difference.name}")
        for line in _details(difference):
            out.print(_indented(line, width))
    if len(shown) < len(ordered):
        out.print(f"\nand {len(ordered) - len(shown)} more; --limit 0 lists all of them")
    if ordered:
        out.print("\nby layer, with the largest relative difference and the worst tensor:")
        for line in _by_layer(ordered, width):
            out.print(line)
    out.print()
    if report.names_only:
        out.print(f"compared by name alone, other layouts were not paired: {report.names_only}")
    counts = {status: sum(d.status == status for d in ordered) for status in MEANINGS}
    if ordered:
        listed = "; ".join(f"{MEANINGS[status]}: {count}" for status, count in counts.items() if count)
        out.print(textwrap.fill(listed, width, subsequent_indent="  "))
    out.print(f"{'equal' if agrees else 'DIFFERENT'}: {report.equal} of {report.compared} byte for byte")


def _indented(line: str, width: int) -> str:
    lines = textwrap.wrap(
        line, width, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def worst_first(differences: Sequence[TensorDifference]) -> list[TensorDifference]:
    """In the order of MEANINGS; of other values, those with another NaN or infinity, then by relative difference."""
    order = list(MEANINGS)

    def key(difference: TensorDifference) -> tuple[int, bool, float]:
        values = difference.values
        size = values.relative.size if values and values.relative else 0.0
        return order.index(difference.status), not differs_in_non_finite(difference), -size

    return sorted(differences, key=key)


def differs_in_non_finite(difference: TensorDifference) -> bool:
    """Whether one side has more NaN or infinite values than the other."""
    values = difference.values
    return values is not None and any(a != b for a, b in (values.nan, values.infinite))


def _side(side: VerifiedSide) -> Iterator[str]:
    yield f"{KINDS[side.kind]}, {side.tensors} tensors"
    if side.carried:
        yield f"{side.carried} carried in hf_source/"
    if side.left_out:
        yield f"{len(side.left_out)} left out as asked"
    if side.ignored:
        yield f"{side.ignored} entries that are not weights ignored"
    for name, rows in side.padding.items():
        yield f"{rows} padding rows of {name} cut"


def _details(difference: TensorDifference) -> Iterator[str]:
    values = difference.values
    what = MEANINGS[difference.status]
    if values is not None and difference.status == "values":
        what = f"{what}: {values.count:,} of {values.total:,}"
    yield f"{what}; {_dtypes_and_shapes(difference)}"
    if values is not None and difference.status == "shape":
        yield f"in the rows that both have, {values.count:,} of {values.total:,} values differ"
    if values is not None:
        if (largest := values.absolute) is not None:
            yield (
                f"largest |a - b|: {largest.size:.4g} at {list(largest.index)}, {largest.a:.9g} in A, "
                f"{largest.b:.9g} in B"
            )
        elif values.first is not None:
            yield f"first at {list(values.first)}"
        if (largest := values.relative) is not None:
            yield f"largest relative difference: {largest.size:.4g} at {list(largest.index)}"
        for what, (a, b) in (("NaN", values.nan), ("infinite", values.infinite)):
            if a or b:
                yield f"{what}: {a:,} in A, {b:,} in B"
    if difference.note:
        yield in_flags(difference.note)


def _dtypes_and_shapes(difference: TensorDifference) -> str:
    a, b = difference.a, difference.b
    if a is None or b is None:
        info = a or b
        assert info is not None
        return f"{DTYPE_NAMES[info.dtype]} {list(info.shape)}"
    dtypes, shapes = (DTYPE_NAMES[a.dtype], DTYPE_NAMES[b.dtype]), (list(a.shape), list(b.shape))
    if dtypes[0] == dtypes[1] and shapes[0] == shapes[1]:
        return f"{dtypes[0]} {shapes[0]}"
    return f"{dtypes[0]} {shapes[0]} in A, {dtypes[1]} {shapes[1]} in B"


def _by_layer(ordered: Sequence[TensorDifference], width: int) -> Iterator[str]:
    found: dict[Layer, list[tuple[str, TensorDifference]]] = {}
    for difference in ordered:
        layer, module = split_name(difference.name)
        found.setdefault(layer, []).append((module, difference))
    yield _columns("layer", "differ", "relative", "worst", width)
    for layers, group in itertools.groupby(sorted(found), key=lambda layer: layer.layers):
        yield f"{layers or NO_LAYER}:"
        for layer in group:
            sizes = [d.values.relative.size for _, d in found[layer] if d.values is not None and d.values.relative]
            module, worst = found[layer][0]
            what = "NaN or infinity" if differs_in_non_finite(worst) else _IN_SUMMARY[worst.status]
            yield _columns(
                str(layer.number) if layers else "",
                str(len(found[layer])),
                f"{max(sizes):.3g}" if sizes else "",
                f"{module}: {what}" if what else module,
                width,
            )


def _columns(layer: str, differ: str, relative: str, worst: str, width: int) -> str:
    start = f"{layer:>6}  {differ:>6}  {relative:>9}  "
    return textwrap.fill(
        worst,
        width,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
