"""The report of a comparison of two checkpoints, and the class that collects it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_fp32.checkpoint.compare.difference import Comparison, ValueDifference
from megatron_fp32.checkpoint.identify import CheckpointKind
from megatron_fp32.checkpoint.progress import ProgressCallback
from megatron_fp32.validation import check_flag
from megatron_fp32.weights.spec import TensorSpec
from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, TensorInfo

Status = Literal["only_a", "only_b", "shape", "values", "dtype"]
"""How a tensor differs.

- `"only_a"`, `"only_b"`: only one checkpoint has it.
- `"shape"`: the shapes differ.
- `"values"`: the values differ.
- `"dtype"`: the values are equal and the dtypes differ.
"""

_FLOAT8 = {dtype for name, dtype in DTYPES.items() if name.startswith("F8_E") and name != "F8_E8M0"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """A tensor that is not equal byte for byte in both checkpoints."""

    name: str
    """The Hugging Face name. The Megatron name if only a Megatron checkpoint has the tensor, or both are Megatron
    checkpoints. If only one of two Hugging Face checkpoints fuses experts, the name of the separate expert; `note` then
    has the other names."""
    status: Status
    a: TensorInfo | None
    """None if only b has the tensor."""
    b: TensorInfo | None
    """None if only a has the tensor."""
    values: ValueDifference | None = None
    """The values' differences, if the shapes are equal. If one tensor has more rows of the vocabulary, the differences
    in the rows that both have."""
    note: str = ""
    """What else a reader must know; may be empty."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifiedSide:
    """One of the two checkpoints."""

    path: Path
    kind: CheckpointKind
    tensors: int
    """Number of tensors of the model in its files, without those in `left_out`."""
    carried: int
    """Number of tensors in its sidecar. They are compared if the other checkpoint is a Hugging Face checkpoint."""
    ignored: int
    """Number of entries that are not weights, such as optimizer, generators, common state and `_extra_state`."""
    left_out: tuple[str, ...]
    """Names of the tensors that were left out because of `text_only`."""
    padding: dict[str, int]
    """Number of padding rows of the vocabulary, by tensor. They were not compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """The result of a comparison."""

    a: VerifiedSide
    b: VerifiedSide
    compared: int
    """Number of tensors that both checkpoints have in one shape. A tensor that is several tensors in the other
    checkpoint counts as several."""
    equal: int
    """Number of compared tensors that are equal byte for byte and in dtype."""
    nbytes: int
    """Size of the compared tensors of a in bytes."""
    differences: tuple[TensorDifference, ...]
    """In the order of `Status`."""
    names_only: str = ""
    """Why two Hugging Face checkpoints with different names were only compared by name. Empty if they were not."""

    def agrees(self, *, values_only: bool = False) -> bool:
        """Whether the checkpoints are equal. With `values_only`, dtypes may differ."""
        check_flag("values_only", values_only)
        return all(values_only and difference.status == "dtype" for difference in self.differences)

    def as_json(self) -> dict[str, Any]:
        """The content for `json.dumps`. Dtypes have safetensors' names."""
        content = dataclasses.asdict(dataclasses.replace(self, differences=()))
        for side in ("a", "b"):
            content[side]["path"] = str(content[side]["path"])
        content["differences"] = [
            {
                "name": difference.name,
                "status": difference.status,
                "a": _info_as_json(difference.a),
                "b": _info_as_json(difference.b),
                "values": difference.values and dataclasses.asdict(difference.values),
                "note": difference.note,
            }
            for difference in self.differences
        ]
        return content


def _info_as_json(info: TensorInfo | None) -> dict[str, Any] | None:
    return None if info is None else {"dtype": DTYPE_NAMES[info.dtype], "shape": list(info.shape)}


class Findings:
    """Collects the differences while two checkpoints are compared.

    Args:
        tell: called after every pair of tensors.

    Attributes:
        total: bytes of all tensors that will be compared, for `tell`.
        names_only: see `VerifyReport`.
    """

    def __init__(self, tell: ProgressCallback) -> None:
        self.total = 0
        self.names_only = ""
        self._tell = tell
        self._nbytes = 0
        self._comparisons: dict[str, tuple[Comparison, TensorInfo, TensorInfo]] = {}
        self._notes: dict[str, str] = {}
        self._others: dict[str, TensorDifference] = {}

    def add_only(self, side: Literal["a", "b"], name: str, info: TensorInfo, note: str = "") -> None:
        """Record a tensor that only one checkpoint has."""
        a, b = (info, None) if side == "a" else (None, info)
        status: Status = "only_a" if side == "a" else "only_b"
        self._others[name] = TensorDifference(name=name, status=status, a=a, b=b, note=note)

    def add_shapes(self, name: str, a: TensorInfo, b: TensorInfo, note: str = "") -> None:
        """Record a tensor whose shapes differ."""
        self._others[name] = TensorDifference(name=name, status="shape", a=a, b=b, note=note)

    def add_values(self, spec: TensorSpec, a: Tensor, b: Tensor, note: str = "") -> None:
        """Compare the values of a tensor, or of an element of a stack."""
        first, second = (TensorInfo(dtype=tensor.dtype, shape=spec.stored_shape) for tensor in (a, b))
        if spec.name in self._comparisons:
            comparison, *known = self._comparisons[spec.name]
            # Elements of an exported stack may have two dtypes. The stack then has the wider one.
            first, second = (
                max(pair, key=lambda info: info.dtype.itemsize) for pair in zip(known, (first, second), strict=True)
            )
        else:
            comparison = Comparison(spec.stored_shape)
        comparison.add(a, b, spec.index)
        self._comparisons[spec.name] = (comparison, first, second)
        self._notes[spec.name] = note
        self._nbytes += a.nbytes
        self._tell("compare", a.nbytes, self.total)

    def report(self, a: VerifiedSide, b: VerifiedSide) -> VerifyReport:
        """The report of everything that was recorded."""
        differences = list(self._others.values())
        for name, (comparison, first, second) in self._comparisons.items():
            values = comparison.result()
            if name in self._others:
                index = differences.index(self._others[name])
                differences[index] = dataclasses.replace(self._others[name], values=values)
            elif values.count or first.dtype != second.dtype:
                differences.append(
                    TensorDifference(
                        name=name,
                        status="values" if values.count else "dtype",
                        a=first,
                        b=second,
                        values=values,
                        note="; ".join(filter(None, (self._notes[name], _note_on_float8(first.dtype, second.dtype)))),
                    )
                )
        order = get_args(Status)
        compared = len(self._comparisons.keys() - self._others.keys())
        return VerifyReport(
            a=a,
            b=b,
            compared=compared,
            equal=compared + len(self._others) - len(differences),
            nbytes=self._nbytes,
            differences=tuple(sorted(differences, key=lambda difference: order.index(difference.status))),
            names_only=self.names_only,
        )


def _note_on_float8(a: torch.dtype, b: torch.dtype) -> str:
    return "float8 codes without their scales" if (a in _FLOAT8) != (b in _FLOAT8) else ""
