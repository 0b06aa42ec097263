"""The record that an import makes of its Hugging Face checkpoint: the content of `hf_source/source.json`.

An export needs it to write the dtypes of the source, and to count the tensors that are unchanged.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from megatron_fp32.weights.tensors import DTYPE_NAMES, DTYPES, TensorInfo, is_possible_shape

VERSION = 2

_DIGEST = re.compile("[0-9a-f]{32}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceTensor:
    """One tensor of the Hugging Face checkpoint that was imported."""

    info: TensorInfo
    digest: str
    """XXH3-128 of the tensor's bytes, 32 hexadecimal digits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """The tensors of the Hugging Face checkpoint that was imported."""

    tensors: Mapping[str, SourceTensor]
    """The tensors that were converted, by name."""
    carried: Mapping[str, SourceTensor]
    """The tensors that were not converted but are kept in the sidecar, such as a vision part, by name."""
    left_out: tuple[str, ...]
    """Names of the tensors that were neither converted nor kept."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Dtype and shape of the converted tensors, by name."""
        return {name: tensor.info for name, tensor in self.tensors.items()}

    def to_json(self, *, family: str) -> dict[str, Any]:
        """The content of `source.json`. `family` is only for people who read the file."""
        return {
            "version": VERSION,
            "family": family,
            "tensors": _listed(self.tensors),
            "carried": _listed(self.carried),
            "left_out": list(self.left_out),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> SourceRecord:
        """The record in a parsed `source.json` of version `VERSION`.

        Raises:
            ValueError: for content that `to_json` cannot have written. The message names the tensor.
        """
        left_out = content.get("left_out")
        if not isinstance(left_out, list) or not all(isinstance(name, str) for name in left_out):
            raise ValueError("left_out must be a list of tensor names")
        return cls(
            tensors=_unlisted(content, "tensors"), carried=_unlisted(content, "carried"), left_out=tuple(left_out)
        )


def _listed(tensors: Mapping[str, SourceTensor]) -> dict[str, Any]:
    return {
        name: {"dtype": DTYPE_NAMES[t.info.dtype], "shape": list(t.info.shape), "xxh3_128": t.digest}
        for name, t in tensors.items()
    }


def _unlisted(content: Mapping[str, Any], part: str) -> dict[str, SourceTensor]:
    listed = content.get(part)
    if not isinstance(listed, dict):
        raise ValueError(f"{part} must be an object with tensor names as keys")
    return {name: _source_tensor(f"{part}: {name[:200]!r}", entry) for name, entry in listed.items()}


def _source_tensor(what: str, entry: Any) -> SourceTensor:
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "xxh3_128"}:
        raise ValueError(f"{what} must be an object with dtype, shape and xxh3_128")
    dtype, shape, value = entry["dtype"], entry["shape"], entry["xxh3_128"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} has the unknown dtype {str(dtype)[:40]!r}")
    if not isinstance(shape, list) or not is_possible_shape(shape, DTYPES[dtype]):
        raise ValueError(f"{what} cannot have the shape {str(shape)[:200]}")
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{what} has the digest {str(value)[:40]!r}, expected 32 hexadecimal digits")
    return SourceTensor(info=TensorInfo(dtype=DTYPES[dtype], shape=tuple(shape)), digest=value)
