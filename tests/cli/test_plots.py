"""What the pictures show: their data, labels and marks. No pixel is looked at."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from safetensors.torch import save_file

from megatron_fp32 import cli, inspect_checkpoint, verify_checkpoints
from megatron_fp32.cli.layers import Layer, split_name, without_numbers
from megatron_fp32.cli.plots import plot_differences, plot_dtypes
from tests.support import run_command

Tensors = dict[str, torch.Tensor]


def _tensors() -> Tensors:
    """Two layers, of which the second has experts; a layer of another list; and two tensors of no layer."""
    ones = torch.ones(4)
    return {
        "model.embed_tokens.weight": ones.bfloat16(),
        "lm_head.weight": ones.bfloat16(),
        "model.layers.0.linear_attn.A_log": ones,
        "model.layers.0.mlp.up_proj.weight": ones.bfloat16(),
        "model.layers.10.mlp.experts.0.up_proj.weight": ones.bfloat16(),
        "model.layers.10.mlp.experts.1.up_proj.weight": ones.half(),
        "model.layers.2.mlp.up_proj.weight": ones.bfloat16(),
        "mtp.layers.0.mlp.up_proj.weight": ones.half(),
    }


def _write(directory: Path, tensors: Tensors) -> Path:
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    return directory


def _labels(axes: Axes) -> tuple[list[str], list[str]]:
    return [label.get_text() for label in axes.get_xticklabels()], [
        label.get_text() for label in axes.get_yticklabels()
    ]


def _cells(axes: Axes) -> dict[tuple[str, str], float]:
    """Values of the image by column and row, without the masked ones."""
    (image,) = axes.get_images()
    values = image.get_array()
    columns, rows = _labels(axes)
    return {
        (columns[x], rows[y]): float(values[y, x])
        for y, x in np.ndindex(values.shape)
        if not np.ma.getmaskarray(values)[y, x]
    }


def _marks(axes: Axes) -> dict[tuple[str, str], str]:
    columns, rows = _labels(axes)
    return {(columns[int(t.get_position()[0])], rows[int(t.get_position()[1])]): t.get_text() for t in axes.texts}


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.3.mlp.experts.5.up_proj.weight", Layer("model.layers", 3), "mlp.experts.5.up_proj.weight"),
        (
            "model.language_model.layers.12.input_layernorm.weight",
            Layer("model.language_model.layers", 12),
            "input_layernorm.weight",
        ),
        ("model.visual.blocks.7.attn.qkv.bias", Layer("model.visual.blocks", 7), "attn.qkv.bias"),
        ("layers.0.weight", Layer("layers", 0), "weight"),
        ("decoder.layers.mlp.linear_fc2.weight", Layer("", 0), "decoder.layers.mlp.linear_fc2.weight"),
        ("lm_head.weight", Layer("", 0), "lm_head.weight"),
        ("my_layers.0", Layer("", 0), "my_layers.0"),
    ],
)
def test_the_layer_of_a_name(name: str, layer: Layer, module: str) -> None:
    assert split_name(name) == (layer, module)


def test_layers_sort_by_number() -> None:
    names = ["a.layers.10.x", "a.layers.9.x", "x", "a.layers.1.x"]
    assert [str(layer) for layer in sorted(split_name(name)[0] for name in names)] == [
        *("no layer", "a.layers.1", "a.layers.9", "a.layers.10")
    ]
    assert without_numbers("mlp.experts.12.up_proj.3") == "mlp.experts.*.up_proj.3"


class TestDtypes:
    def test_the_cells(self, tmp_path: Path) -> None:
        figure = plot_dtypes(inspect_checkpoint(_write(tmp_path / "hf", _tensors())))
        (axes,) = figure.axes
        (legend,) = figure.legends
        kinds = [text.get_text() for text in legend.get_texts()]
        assert kinds == ["BF16", "F16", "F32", "several"]
        columns, rows = _labels(axes)
        assert columns == ["no layer", "model.layers.0", "2", "10", "mtp.layers.0"]
        assert sorted(rows) == [
            "linear_attn.A_log",
            "lm_head.weight",
            "mlp.experts.*.up_proj.weight",
            "mlp.up_proj.weight",
            "model.embed_tokens.weight",
        ]
        assert {cell: kinds[int(kind)] for cell, kind in _cells(axes).items()} == {
            ("no layer", "lm_head.weight"): "BF16",
            ("no layer", "model.embed_tokens.weight"): "BF16",
            ("model.layers.0", "linear_attn.A_log"): "F32",
            ("model.layers.0", "mlp.up_proj.weight"): "BF16",
            ("2", "mlp.up_proj.weight"): "BF16",
            ("10", "mlp.experts.*.up_proj.weight"): "several",
            ("mtp.layers.0", "mlp.up_proj.weight"): "F16",
        }

    def test_colors_are_those_of_the_legend(self, tmp_path: Path) -> None:
        figure = plot_dtypes(inspect_checkpoint(_write(tmp_path / "hf", _tensors())))
        (image,) = figure.axes[0].get_images()
        shown = [patch.get_facecolor() for patch in figure.legends[0].get_patches()]
        assert [image.cmap(image.norm(kind)) for kind in range(4)] == shown
        assert len(set(shown)) == 4

    def test_the_command(self, tmp_path: Path) -> None:
        hf = _write(tmp_path / "hf", _tensors())
        result = run_command("inspect", hf, "--plot", tmp_path / "out.svg")
        assert (result.exit_code, result.stdout) == (0, run_command("inspect", hf).stdout)
        assert "<svg" in (tmp_path / "out.svg").read_text()


class TestDifferences:
    @pytest.fixture
    def pair(self, tmp_path: Path) -> tuple[Path, Path]:
        a, b = _tensors(), _tensors()
        del b["lm_head.weight"]
        b["model.embed_tokens.weight"] = torch.ones(5).bfloat16()
        b["model.layers.0.linear_attn.A_log"][1] = 0.5
        b["model.layers.0.mlp.up_proj.weight"] = b["model.layers.0.mlp.up_proj.weight"].float()
        b["model.layers.2.mlp.up_proj.weight"][0] = float("nan")
        b["model.layers.2.mlp.up_proj.weight"][1] = 0.875
        b["model.layers.10.mlp.experts.0.up_proj.weight"][0] = 0.75
        b["model.layers.10.mlp.experts.1.up_proj.weight"][3] = 0.25
        a["mtp.layers.0.mlp.up_proj.weight"][2] = 0.0
        b["mtp.layers.0.mlp.up_proj.weight"][2] = -0.0
        return _write(tmp_path / "a", a), _write(tmp_path / "b", {**b, "more": torch.ones(1)})

    def test_the_cells(self, pair: tuple[Path, Path]) -> None:
        axes, colors = plot_differences(verify_checkpoints(*pair)).axes
        assert _cells(axes) == {
            ("model.layers.0", "linear_attn.A_log"): 0.5,
            ("2", "mlp.up_proj.weight"): 0.125,
            ("10", "mlp.experts.*.up_proj.weight"): 0.75,
        }
        assert _marks(axes) == {
            ("no layer", "lm_head.weight"): "A",
            ("no layer", "more"): "B",
            ("no layer", "model.embed_tokens.weight"): "S",
            ("model.layers.0", "mlp.up_proj.weight"): "D",
            ("2", "mlp.up_proj.weight"): "N",
            ("mtp.layers.0", "mlp.up_proj.weight"): "0",
        }
        assert axes.get_xlabel().splitlines() == [
            "A: only in A",
            "B: only in B",
            "S: other shape",
            "D: same values, other dtype",
            "N: NaN, infinite or complex values differ",
            "0: 0.0 and -0.0",
        ]
        (image,) = axes.get_images()
        assert (image.norm.vmin, image.norm.vmax) == (0.125, 0.75)
        assert colors.get_label() == "<colorbar>"
        assert f"A: {pair[0]}\nB: {pair[1]}\n" in axes.get_title()

    def test_one_size(self, tmp_path: Path) -> None:
        """A logarithmic scale needs two."""
        pair = [_write(tmp_path / name, {"x": torch.tensor([value])}) for name, value in (("a", 1.0), ("b", 0.5))]
        axes, _ = plot_differences(verify_checkpoints(*pair)).axes
        assert _cells(axes) == {("no layer", "x"): 0.5}
        (image,) = axes.get_images()
        assert image.norm.vmin < image.norm.vmax == 0.5

    def test_equal_checkpoints(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        figure = plot_differences(verify_checkpoints(pair[0], pair[0]))
        (axes,) = figure.axes
        assert (list(axes.get_images()), list(axes.texts)) == ([], [])
        assert "no difference in 8 tensors" in axes.get_title()
        figure.savefig(tmp_path / "equal.png")

    def test_the_command(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        for file in ("out.png", "out.png", "out.pdf"):
            result = run_command("verify", *pair, "--plot", tmp_path / file)
            assert (result.exit_code, result.stdout) == (1, run_command("verify", *pair).stdout)
        assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "out.pdf").read_bytes().startswith(b"%PDF")

    def test_a_plot_that_fails_does_not_take_the_report_with_it(
        self, pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*_: object) -> None:
            raise OSError(28, "No space left on device", "out.png")

        monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
        for command in (["verify", *pair], ["inspect", pair[0]]):
            result = run_command(*command, "--plot", tmp_path / "out.png")
            assert result.exit_code == 2
            assert result.stdout == run_command(*command).stdout
            assert "out.png" in result.stderr


class TestRefused:
    """Before anything is read: the directories hold no checkpoint, and nothing is said of that."""

    @pytest.fixture(params=[["inspect", "."], ["verify", ".", "."]], ids=lambda command: command[0])
    def command(self, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        monkeypatch.chdir(tmp_path)
        return request.param

    def test_without_matplotlib(self, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delitem(sys.modules, "megatron_fp32.cli.plots")
        monkeypatch.delattr(cli, "plots")
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        result = run_command(*command, "--plot", "out.png")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            "megatron-fp32: matplotlib is not installed. Install it: pip install 'megatron_fp32[plot]'\n"
        )

    @pytest.mark.parametrize("file", ["out", "out.txt", "out.jpeg2"])
    def test_another_format(self, command: list[str], file: str) -> None:
        result = run_command(*command, "--plot", file)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{file}: the name of a plot must end with one of .pdf, .png, .svg" in result.stderr
        assert "png" in result.stderr

    def test_a_link_that_leads_nowhere(self, command: list[str]) -> None:
        Path("out.png").symlink_to("no/such.png")
        result = run_command(*command, "--plot", "out.png")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "out.png cannot be written: no file can be made there" in result.stderr

    def test_a_directory_that_does_not_exist(self, command: list[str], tmp_path: Path) -> None:
        result = run_command(*command, "--plot", "no/such/out.png")
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"no/such/out.png cannot be written: there is no directory {tmp_path / 'no/such'}" in result.stderr
