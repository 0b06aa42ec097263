"""Draw time against error from the results of `linear_logprobs.py`.

    python benchmarks/time_and_error.py benchmarks/results/linear_logprobs-h200.json docs/time-and-error.svg

Needs matplotlib.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

RIVALS = ("Liger", "CCE", "megatron-core")


@click.command()
@click.argument("result", type=click.Path(path_type=Path, exists=True))
@click.argument("picture", type=click.Path(path_type=Path))
def main(result: Path, picture: Path) -> None:
    measured = json.loads(result.read_text())
    shapes = list(dict.fromkeys(row["shape"] for row in measured["rows"]))
    names = list(dict.fromkeys(row["what"] for row in measured["rows"] if "error_dX" in row))
    figure, axes = plt.subplots(2, len(shapes), figsize=(5 * len(shapes) + 4, 8), squeeze=False)
    for column, shape in enumerate(shapes):
        rows = [row for row in measured["rows"] if row["shape"] == shape and "error_dX" in row]
        for axis, error, label in zip(axes[:, column], ("error_dX", "error_dW"), ("dX", "dW"), strict=True):
            draw(axis, rows, names, error)
            axis.set_ylabel(f"relative error of {label}")
        axes[0, column].set_title(shape)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle(f"forward and backward, {measured['gpu']}, torch {measured['torch']}")
    figure.tight_layout(rect=(0, 0, 1 - 3.6 / (5 * len(shapes) + 4), 1))
    figure.legend(handles, labels, loc="center right", fontsize=8)
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def draw(axis: Axes, rows: list[dict[str, Any]], names: list[str], error: str) -> None:
    colors = plt.get_cmap("tab20").colors  # type: ignore[attr-defined]
    for row in rows:
        marker = "X" if row["what"].startswith(RIVALS) else "s" if "invariant" in row["what"] else "o"
        color = colors[names.index(row["what"]) % len(colors)]
        axis.plot(row["ms"], row[error], marker, color=color, label=row["what"], markersize=9, alpha=0.8)
    # One line for all rows: the median of their units.
    unit = sorted(row["unit_ms"] for row in rows if row["unit"] == "three")
    axis.axvline(unit[len(unit) // 2], color="grey", linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    axis.set_xlim(left=0)
    axis.set_xlabel("ms (dotted: three bare bf16 products)")


if __name__ == "__main__":
    main()
