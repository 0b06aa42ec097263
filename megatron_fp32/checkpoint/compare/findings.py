"""What a comparison of two checkpoints reports, and how it is gathered."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from megatron_fp32.checkpoint.compare.difference import Comparison, ValueDifference
from megatron_fp32.checkpoint.identify import Kind
from megatron_fp32.checkpoint.progress import ProgressCallback
from megatron_fp32.validation import check_flag
from megatron_fp32.weights.spec import TensorSpec
from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, TensorInfo

Status = Literal["only_a", "only_b", "shape", "values", "dtype"]
"""In one checkpoint only; another shape; other values; the same values in another dtype."""

_FLOAT8 = {dtype for name, dtype in DTYPES.items() if name.startswith("F8_E") and name != "F8_E8M0"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorDifference:
    """A tensor that is not equal byte for byte."""

    name: str
    """Hugging Face's when either checkpoint is; of what only a Megatron checkpoint has, Megatron's. Where two layouts
    of Hugging Face's are compared, as the finer has it, and `note` has the other names."""
    status: Status
    a: TensorInfo | None
    """None where only the other has it."""
    b: TensorInfo | None
    values: ValueDifference | None = None
    """Given where shapes are equal; where one has more rows of the vocabulary, of the rows that both have."""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifiedSide:
    """One of the two checkpoints."""

    path: Path
    kind: Kind
    tensors: int
    """Of the model, in its files; without those of `left_out`."""
    carried: int
    """Kept by its sidecar, and compared when the other checkpoint is Hugging Face's."""
    ignored: int
    """Entries that are no weights: optimizer, generators, common state, `_extra_state`."""
    left_out: tuple[str, ...]
    """Tensors of the parts that `text_only` leaves out."""
    padding: dict[str, int]
    """Rows of zeros that pad the vocabulary, by tensor. They were not compared."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What a comparison found."""

    a: VerifiedSide
    b: VerifiedSide
    compared: int
    """Tensors that both have, in one shape. A tensor that the other has in several counts as those."""
    equal: int
    """Of those, equal byte for byte, dtype included."""
    nbytes: int
    """Size of what was compared, in a."""
    differences: tuple[TensorDifference, ...]
    """In the order of `Status`."""
    names_only: str = ""
    """Why two Hugging Face checkpoints, each with names that the other lacks, were compared by name alone."""

    def agrees(self, *, values_only: bool = False) -> bool:
        """Nothing differs, or with `values_only` nothing but dtypes."""
        check_flag("values_only", values_only)
        return all(values_only and difference.status == "dtype" for difference in self.differences)

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`. Dtypes have safetensors' names."""
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
    """What is known so far.

    Args:
        tell: told of every pair of tensors.

    Attributes:
        total: size of everything that will be compared, for `tell`.
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

    def only(self, side: Literal["a", "b"], name: str, info: TensorInfo, note: str = "") -> None:
        """One side alone has it."""
        a, b = (info, None) if side == "a" else (None, info)
        status: Status = "only_a" if side == "a" else "only_b"
        self._others[name] = TensorDifference(name=name, status=status, a=a, b=b, note=note)

    def shape(self, name: str, a: TensorInfo, b: TensorInfo, note: str = "") -> None:
        """Both have it, in other shapes."""
        self._others[name] = TensorDifference(name=name, status="shape", a=a, b=b, note=note)

    def both(self, spec: TensorSpec, a: Tensor, b: Tensor, note: str = "") -> None:
        """Values of a tensor, or of an element of a stack."""
        first, second = (TensorInfo(dtype=tensor.dtype, shape=spec.stored_shape) for tensor in (a, b))
        if spec.name in self._comparisons:
            comparison, *known = self._comparisons[spec.name]
            # Elements of an exported stack may have two dtypes; the stack has the wider.
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
        """Everything."""
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
