"""Draw the loss curves of `pretrain_qwen3_5.py`.

    python benchmarks/loss_curves.py benchmarks/results/pretrain-h200.json docs/loss-curves.svg

Needs matplotlib.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import matplotlib.pyplot as plt


@click.command()
@click.argument("result", type=click.Path(path_type=Path, exists=True))
@click.argument("picture", type=click.Path(path_type=Path))
def main(result: Path, picture: Path) -> None:
    measured = json.loads(result.read_text())
    curves = measured["curves"]
    figure, (above, below) = plt.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(2, 1))
    for name, losses in curves.items():
        above.plot(range(1, len(losses) + 1), losses, label=name, linewidth=1)
    above.set_yscale("log")
    above.set_ylabel("loss")
    above.set_title(f"{measured['gpu']}, torch {measured['torch']}")
    above.legend()
    difference = [s - f for s, f in zip(curves["stock"], curves["fp32"], strict=True)]
    below.plot(range(1, len(difference) + 1), difference, color="black", linewidth=0.8)
    below.axhline(0, color="grey", linewidth=0.5)
    below.set_yscale("symlog", linthresh=1e-4)
    below.set_ylabel("stock - fp32")
    below.set_xlabel("iteration")
    figure.tight_layout()
    figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
