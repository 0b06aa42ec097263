"""Checkpoints that are changed for a comparison, and what its report says of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32.checkpoint.compare.findings import TensorDifference, VerifyReport
from tests.checkpoint.support import rewrite

Tensors = dict[str, Tensor]
Changes = Callable[[Tensors], Tensors]


def altered(hf: Path, out: Path, *changes: Changes, config: dict[str, Any] | None = None) -> Path:
    shutil.copytree(hf, out)
    if config is not None:
        (out / "config.json").write_text(json.dumps(config))
    for change in changes:
        rewrite(out, change)
    return out


def each(**changes: Callable[[Tensor], Tensor]) -> Changes:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: next((f for end, f in changes.items() if name.endswith(end)), lambda t: t)(tensor)
            for name, tensor in tensors.items()
        }

    return change


def without(*ends: str) -> Changes:
    return lambda tensors: {name: t for name, t in tensors.items() if not name.endswith(ends)}


def without_start(*starts: str) -> Changes:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}


def statuses_of(report: VerifyReport) -> dict[str, str]:
    return {difference.name: difference.status for difference in report.differences}


def the_only(report: VerifyReport) -> TensorDifference:
    (difference,) = report.differences
    return difference


def load(directory: Path) -> dict[str, Tensor]:
    return {n: t for path in sorted(directory.glob("*.safetensors")) for n, t in load_file(path).items()}


def assert_differences(report: VerifyReport, a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """The report says what float64 says of two checkpoints with the same names, shapes and dtypes."""
    assert a.keys() == b.keys()
    expected = {}
    for name, first in a.items():
        x, y = first.double(), b[name].double()
        if not torch.equal(x, y):
            sizes = (x - y).abs()
            relative = (sizes / torch.maximum(x.abs(), y.abs())).nan_to_num(0)
            expected[name] = (int((x != y).sum()), float(sizes.max()), float(relative.max()))
    found = {}
    for difference in report.differences:
        values = difference.values
        assert difference.status == "values"
        assert values is not None
        assert values.absolute is not None
        assert values.relative is not None
        found[difference.name] = (values.count, values.absolute.size, values.relative.size)
        pair = a[difference.name][values.absolute.index], b[difference.name][values.absolute.index]
        assert (values.absolute.a, values.absolute.b) == (float(pair[0]), float(pair[1]))
        assert abs(values.absolute.a - values.absolute.b) == values.absolute.size
    assert found == {n: (count, size, pytest.approx(relative)) for n, (count, size, relative) in expected.items()}
    assert (report.compared, report.equal) == (len(a), len(a) - len(expected))
