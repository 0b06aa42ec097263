"""Pictures of an inspection and of a comparison: layers from left to right, modules from top to bottom.

Both functions return a matplotlib Figure; `figure.savefig("out.png")` writes it. pyplot is not used: no window opens,
and no setting of matplotlib changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from megatron_fp32.checkpoint.compare.findings import TensorDifference, VerifyReport
from megatron_fp32.checkpoint.inspect import Inspection
from megatron_fp32.cli.layers import Layer, split_name, without_numbers
from megatron_fp32.cli.verify_text import differs_in_non_finite, worst_first
from megatron_fp32.extras import remedy_named
from megatron_fp32.weights.tensors import DTYPE_NAMES

with remedy_named():
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm, ListedColormap, LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

FORMATS = (".pdf", ".png", ".svg")
"""What the name of a plot ends with."""

SEVERAL = "several"
"""Legend of a cell whose tensors have more than one dtype, such as experts of one layer."""

MARKS = {
    "A": "only in A",
    "B": "only in B",
    "S": "other shape",
    "D": "same values, other dtype",
    "N": "NaN, infinite or complex values differ",
    "0": "0.0 and -0.0",
}
"""Letters in the cells of a comparison."""

_OF_STATUS = {"only_a": "A", "only_b": "B", "shape": "S", "dtype": "D"}


def check_file(file: Path) -> None:
    """Raise ValueError for a file that cannot be written: another format, or a directory where no file can be made.

    Of matplotlib's formats only those are taken that need no other program.
    """
    if file.suffix.lower() not in FORMATS:
        raise ValueError(f"{file}: the name of a plot must end with one of {', '.join(FORMATS)}")
    directory = file.absolute().parent
    if not directory.is_dir():
        raise ValueError(f"{file} cannot be written: there is no directory {directory}")
    if not os.access(directory, os.W_OK) or (file.is_symlink() and not file.exists()):
        raise ValueError(f"{file} cannot be written: no file can be made there")


def plot_dtypes(found: Inspection) -> Figure:
    """Dtypes by layer and module.

    Args:
        found: the result of `inspect_checkpoint`.

    Returns:
        A Figure with one Axes. Its image holds a number for each cell, the position of the dtype in the legend; cells
        without a tensor are masked. Names that differ in the number of an expert share a cell.
    """
    dtypes: dict[tuple[str, Layer], set[str]] = {}
    for name, info in found.tensors.items():
        dtypes.setdefault(_cell(name), set()).add(DTYPE_NAMES[info.dtype])
    kinds = {cell: min(of_it) if len(of_it) == 1 else SEVERAL for cell, of_it in dtypes.items()}
    labels = sorted(set(kinds.values()), key=lambda kind: (kind == SEVERAL, kind))
    grid = _Grid(kinds)
    figure, axes = grid.axes(f"{found.path}: dtypes")
    if labels:
        colors = ListedColormap([colormaps["tab20"](index % 20) for index in range(len(labels))])
        norm = BoundaryNorm(np.arange(len(labels) + 1) - 0.5, len(labels))
        axes.imshow(
            grid.values({cell: labels.index(kind) for cell, kind in kinds.items()}), colors, norm, aspect="auto"
        )
        handles = [Patch(color=colors(index), label=label) for index, label in enumerate(labels)]
        figure.legend(handles=handles, loc="outside right upper")
    return figure


def plot_differences(report: VerifyReport) -> Figure:
    """Largest relative difference by layer and tensor.

    Args:
        report: the result of `verify_checkpoints`.

    Returns:
        A Figure with an Axes for the tensors that differ, and one for the colors. The image holds the largest relative
        difference of each cell; cells without one are masked. Letters say what else differs (`MARKS`).
    """
    worst: dict[tuple[str, Layer], TensorDifference] = {}
    sizes: dict[tuple[str, Layer], float] = {}
    for difference in worst_first(report.differences):
        cell, size = _cell(difference.name), _relative(difference)
        worst.setdefault(cell, difference)
        if size is not None:
            sizes[cell] = max(size, sizes.get(cell, 0.0))
    grid = _Grid(worst)
    title = "largest |a - b| / max(|a|, |b|)" if worst else f"no difference in {report.compared} tensors"
    figure, axes = grid.axes(f"A: {report.a.path}\nB: {report.b.path}\n{title}")
    if sizes:
        low, high = min(sizes.values()), max(sizes.values())
        norm = LogNorm(low if low < high else high / 10, high)
        image = axes.imshow(grid.values(sizes), "viridis", norm, aspect="auto")
        figure.colorbar(image, ax=axes)
    marks = {cell: mark for cell, difference in worst.items() if (mark := _mark(difference))}
    for cell, mark in marks.items():
        axes.text(*grid.place(cell), mark, ha="center", va="center", color="red", fontweight="bold")
    axes.set_xlabel("\n".join(f"{mark}: {meaning}" for mark, meaning in MARKS.items() if mark in marks.values()))
    return figure


def _mark(difference: TensorDifference) -> str:
    if difference.status != "values":
        return _OF_STATUS[difference.status]
    largest = difference.values.relative if difference.values else None
    if largest is None or differs_in_non_finite(difference):
        return "N"
    return "" if largest.size > 0 else "0"


def _relative(difference: TensorDifference) -> float | None:
    """What has a color: a positive number, for a logarithmic scale."""
    largest = difference.values.relative if difference.values else None
    return largest.size if difference.status == "values" and largest and largest.size > 0 else None


def _cell(name: str) -> tuple[str, Layer]:
    layer, module = split_name(name)
    return without_numbers(module), layer


class _Grid:
    """Modules as rows, in the order in which they come, and layers as columns, in their order."""

    def __init__(self, cells: Iterable[tuple[str, Layer]]) -> None:
        cells = list(cells)
        self.rows = list(dict.fromkeys(module for module, _ in cells))
        self.columns = sorted({layer for _, layer in cells})

    def values(self, found: Mapping[tuple[str, Layer], float]) -> np.ma.MaskedArray:
        """[rows, columns] in float64; masked where nothing was found."""
        values = np.ma.masked_all((len(self.rows), len(self.columns)))
        for cell, value in found.items():
            x, y = self.place(cell)
            values[y, x] = value
        return values

    def place(self, cell: tuple[str, Layer]) -> tuple[int, int]:
        """Column and row."""
        module, layer = cell
        return self.columns.index(layer), self.rows.index(module)

    def axes(self, title: str) -> tuple[Figure, Axes]:
        """A Figure that is large enough for its labels, and Axes with them."""
        size = (6 + 0.25 * len(self.columns), 4 + 0.25 * len(self.rows))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, fontsize="medium")
        axes.set_xticks(range(len(self.columns)), _labels(self.columns), rotation=90)
        axes.set_yticks(range(len(self.rows)), self.rows)
        axes.set_xlim(-0.5, max(len(self.columns), 1) - 0.5)
        axes.set_ylim(max(len(self.rows), 1) - 0.5, -0.5)
        return figure, axes


def _labels(layers: Sequence[Layer]) -> list[str]:
    """Whole names for the first layer of a list, numbers for those that follow it."""
    before = [None, *(layer.layers for layer in layers)]
    return [
        str(layer.number) if layer.layers and layer.layers == last else str(layer)
        for layer, last in zip(layers, before, strict=False)
    ]
