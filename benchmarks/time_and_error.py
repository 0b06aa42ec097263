"""Draw time against error from what `linear_logprobs.py` measured.

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
    figure, axes = plt.subplots(2, len(shapes), figsize=(6.5 * len(shapes), 10), squeeze=False)
    for column, shape in enumerate(shapes):
        rows = [row for row in measured["rows"] if row["shape"] == shape and "error_dX" in row]
        # One time for all: that of three bare products, measured beside each row.
        for axis, error, label in zip(axes[:, column], ("error_dX", "error_dW"), ("dX", "dW"), strict=True):
            draw(axis, rows, error)
            axis.set_ylabel(f"relative error of {label}")
        axes[0, column].set_title(shape)
    figure.suptitle(f"forward and backward, {measured['gpu']}, torch {measured['torch']}")
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


def draw(axis: Axes, rows: list[dict[str, Any]], error: str) -> None:
    for row in rows:
        rival = row["what"].startswith(RIVALS)
        axis.plot(row["ms"], row[error], "s" if rival else "o", color="tab:red" if rival else "tab:blue")
        axis.annotate(row["what"], (row["ms"], row[error]), xytext=(5, 3), textcoords="offset points", fontsize=7)
    unit = [row["unit_ms"] for row in rows if row["unit"] == "three"]
    axis.axvline(sorted(unit)[len(unit) // 2], color="grey", linewidth=0.8, linestyle=":")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.margins(x=0.25, y=0.1)
    axis.set_xlabel("ms (dotted: three bare bf16 products)")


if __name__ == "__main__":
    main()
