"""The text of a comparison: 80 columns, the worst first, and a summary of all layers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from megatron_fp32 import cli

PREFIX = "model.language_model.layers"


def _compare(root: Path, a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], *args: str) -> str:
    for name, tensors in (("a", a), ("b", b)):
        (root / name).mkdir(exist_ok=True)
        save_file(tensors, root / name / "model.safetensors")
    result = CliRunner().invoke(cli.main, ["verify", str(root / "a"), str(root / "b"), *args])
    assert (result.exit_code, result.stderr) == (1, "")
    return result.stdout


def _names(text: str) -> list[str]:
    return re.findall(r"^(\S*[^:\s])\n  ", text, re.MULTILINE)


def _by_layer(text: str) -> list[list[str]]:
    """Lines of the summary, in cells, without its header. An empty cell is missing."""
    (table,) = re.findall(r"^by layer, .*\n +layer .*\n((?:.+\n)+)", text, re.MULTILINE)
    return [re.split(r" {2,}", line.strip()) for line in table.splitlines()]


@pytest.fixture
def pair() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Layers 0 to 11 differ by 1/2 to 1/13; layer 12 has a NaN; layer 13 is missing."""
    a = {f"{PREFIX}.{layer}.mlp.up_proj.weight": torch.ones(3, 4) for layer in range(14)}
    b = {name: tensor.clone() for name, tensor in a.items()}
    for layer in range(12):
        b[f"{PREFIX}.{layer}.mlp.up_proj.weight"][1, 2] = 1 - 1 / (layer + 2)
    b[f"{PREFIX}.12.mlp.up_proj.weight"][0, 0] = float("nan")
    del b[f"{PREFIX}.13.mlp.up_proj.weight"]
    a["norm.weight"] = torch.ones(2)
    b["norm.weight"] = torch.full((2,), 1 - 2.0**-20)
    return a, b


def test_the_worst_comes_first(tmp_path: Path, pair: tuple[dict[str, torch.Tensor], ...]) -> None:
    text = _compare(tmp_path, *pair)
    layers = [13, 12, *range(12)]
    assert _names(text) == [*(f"{PREFIX}.{layer}.mlp.up_proj.weight" for layer in layers), "norm.weight"]
    assert "NaN: 0 in A, 1 in B" in text


def test_the_summary_counts_what_is_not_listed(tmp_path: Path, pair: tuple[dict[str, torch.Tensor], ...]) -> None:
    text = _compare(tmp_path, *pair, "--limit", "1")
    assert _names(text) == [f"{PREFIX}.13.mlp.up_proj.weight"]
    module = "mlp.up_proj.weight"
    assert _by_layer(text) == [
        ["no layer:"],
        ["1", f"{2.0**-20:.3g}", "norm.weight"],
        [f"{PREFIX}:"],
        *([f"{layer}", "1", f"{1 / (layer + 2):.3g}", module] for layer in range(12)),
        ["12", "1", f"{module}: NaN or infinity"],
        ["13", "1", f"{module}: only in A"],
    ]
    assert text.splitlines()[-1] == "DIFFERENT: 0 of 14 byte for byte"


def test_the_largest_of_a_layer_is_shown_beside_what_is_worse(tmp_path: Path) -> None:
    a = {"layers.0.x": torch.ones(2), "layers.0.y": torch.ones(2), "layers.0.z": torch.ones(2)}
    b = {"layers.0.x": torch.ones(3), "layers.0.y": torch.full((2,), 0.5), "layers.0.z": torch.full((2,), 0.75)}
    assert _by_layer(_compare(tmp_path, a, b)) == [["layers:"], ["0", "3", "0.5", "x: other shape"]]


def test_80_columns_are_enough(tmp_path: Path, pair: tuple[dict[str, torch.Tensor], ...]) -> None:
    a, b = pair
    longest = f"{PREFIX}.46.linear_attn.in_proj_qkvz.weight"
    a[longest] = torch.full((2, 2, 300), -1.23456789e-30, dtype=torch.float64)
    b[longest] = a[longest].float()
    b[longest][1, 1, 299] = 2.3456789e-30
    lines = _compare(tmp_path, a, b, "--limit", "0").splitlines()
    lines = [line for line in lines if not line.startswith(("A: ", "B: "))]  # paths are as long as they are
    assert longest in lines
    assert any(line.startswith("    ") for line in lines), "nothing was wrapped"
    assert [line for line in lines if len(line.rstrip()) > 80] == []


def test_a_name_is_never_broken(tmp_path: Path) -> None:
    name = ".".join(["a-module-with-a-long-name"] * 12)
    assert name in _compare(tmp_path, {name: torch.ones(1)}, {name: torch.zeros(1)}).splitlines()
