"""What a checkpoint holds, from headers and metadata alone: no tensor is read."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.fp8.detect import read_quantization_config, scheme_of_tensors
from megatron_fp32.checkpoint.identify import Kind, adapter_files, kind_of, model_tensors, read_config, sidecar_of
from megatron_fp32.checkpoint.sidecar import Sidecar
from megatron_fp32.errors import CheckpointError
from megatron_fp32.validation import check_path
from megatron_fp32.weights.families.registry import find_family
from megatron_fp32.weights.hf_config.text import text_part
from megatron_fp32.weights.naming import MTP, VISION
from megatron_fp32.weights.stacking import has_stacked_layers
from megatron_fp32.weights.tensors import DTYPE_NAMES, TensorInfo

_ITERATION = re.compile(r"iter_(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DtypeTotal:
    """Everything that a checkpoint holds in one dtype."""

    tensors: int
    parameters: int
    nbytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MegatronDetails:
    """What only a Megatron checkpoint has."""

    iteration: int | None
    """As its directory is called; None for `release` and other names."""
    release: bool
    """Its directory is called `release`: it starts a training run."""
    optimizer: bool
    """Optimizer states are there."""
    other_entries: int
    """Entries that are no weights: optimizer, generators, common state, `_extra_state`."""
    stacked_layers: bool
    """One tensor holds all layers of a kind."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SidecarDetails:
    """What an import left beside a Megatron checkpoint."""

    path: Path
    tensors: int
    """Hugging Face tensors that were converted."""
    carried: int
    left_out: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a checkpoint holds. Everything about tensors is about those of the model."""

    path: Path
    """Where its files are."""
    kind: Kind
    model_type: str | None
    """Of the text model. None where no `config.json` says."""
    family: str | None
    """None when it cannot be converted."""
    tensors: Mapping[str, TensorInfo]
    files: Mapping[str, int]
    """Sizes in bytes of the files with weights."""
    multi_token_prediction: bool
    """MTP tensors are there, converted or carried."""
    vision: bool
    """Vision tensors are there, or carried."""
    float8: str | None
    """Layout and format of the scales, or why they are unknown; None where nothing is float8."""
    adapter: tuple[str, ...]
    """Files of an adapter beside the weights, which transformers would add to them."""
    megatron: MegatronDetails | None
    sidecar: SidecarDetails | None

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(math.prod(info.shape) for info in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Size of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def by_dtype(self) -> dict[torch.dtype, DtypeTotal]:
        """Totals, the largest first."""
        infos: dict[torch.dtype, list[TensorInfo]] = {}
        for info in self.tensors.values():
            infos.setdefault(info.dtype, []).append(info)
        totals = {
            dtype: DtypeTotal(
                tensors=len(of_it),
                parameters=sum(math.prod(info.shape) for info in of_it),
                nbytes=sum(info.nbytes for info in of_it),
            )
            for dtype, of_it in infos.items()
        }
        return dict(sorted(totals.items(), key=lambda item: -item[1].nbytes))

    @property
    def fp32_tensors(self) -> tuple[str, ...]:
        """Names of those in fp32."""
        return tuple(name for name, info in self.tensors.items() if info.dtype == torch.float32)

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`, without the list of all tensors. Dtypes have safetensors' names."""
        content = dataclasses.asdict(dataclasses.replace(self, tensors={}))
        content["path"] = str(self.path)
        if self.sidecar:
            content["sidecar"]["path"] = str(self.sidecar.path)
        content["tensors"] = len(self.tensors)
        content["parameters"], content["nbytes"] = self.parameters, self.nbytes
        content["by_dtype"] = {DTYPE_NAMES[d]: dataclasses.asdict(total) for d, total in self.by_dtype.items()}
        content["fp32_tensors"] = list(self.fp32_tensors)
        return content


def inspect_checkpoint(path: str | Path, *, source: str | Path | None = None) -> Inspection:
    """Look at a checkpoint.

    Args:
        path: a directory with `model.safetensors` or its index, or a `torch_dist` checkpoint.
        source: what an import made, for a Megatron checkpoint that a trainer saved elsewhere.

    Raises:
        CheckpointError: when it cannot be read.
        ValueError: when `source` is given for a Hugging Face checkpoint.
    """
    check_path("path", path)
    check_path("source", source, optional=True)
    path = Path(path)
    if kind_of(path) == "megatron":
        return _inspect_megatron(path, source)
    if source is not None:
        raise ValueError(f"source must be left out, because {path} is not a Megatron checkpoint")
    return _inspect_huggingface(path)


def _inspect_huggingface(path: Path) -> Inspection:
    config = read_config(path) if (path / "config.json").is_file() else {}
    with HuggingFaceReader(path) as reader:
        tensors, files = dict(reader.tensors), reader.files
    return Inspection(
        path=path,
        kind="huggingface",
        model_type=_model_type(config),
        family=_family(config),
        tensors=tensors,
        files={file.name: file.stat().st_size for file in files},
        multi_token_prediction=_any_starts(tensors, MTP),
        vision=_any_starts(tensors, VISION),
        float8=_float8(tensors, path),
        adapter=tuple(adapter_files(path)),
        megatron=None,
        sidecar=None,
    )


def _inspect_megatron(path: Path, source: str | Path | None) -> Inspection:
    reader = TorchDistReader(path)
    tensors = model_tensors(reader.tensors)
    sidecar = sidecar_of(path, source)
    config = sidecar.hf_config if sidecar else {}
    carried = sidecar.carried if sidecar else {}
    iteration = _ITERATION.fullmatch(reader.directory.name)
    return Inspection(
        path=reader.directory,
        kind="megatron",
        model_type=_model_type(config),
        family=_family(config),
        tensors=tensors,
        files={file.name: file.stat().st_size for file in sorted(reader.directory.glob("*.distcp"))},
        multi_token_prediction=_any_starts(tensors, MTP) or _any_starts(carried, MTP),
        vision=_any_starts(carried, VISION),
        float8=None,
        adapter=(),
        megatron=MegatronDetails(
            iteration=int(iteration[1]) if iteration else None,
            release=reader.directory.name == "release",
            optimizer=any(name.startswith(("optimizer.", "chained_")) for name in (*reader.tensors, *reader.objects)),
            other_entries=len(reader.tensors) - len(tensors) + len(reader.objects),
            stacked_layers=has_stacked_layers(tensors),
        ),
        sidecar=_sidecar_details(sidecar),
    )


def _sidecar_details(sidecar: Sidecar | None) -> SidecarDetails | None:
    if sidecar is None:
        return None
    return SidecarDetails(
        path=sidecar.directory,
        tensors=len(sidecar.tensors),
        carried=len(sidecar.carried),
        left_out=len(sidecar.left_out),
    )


def _model_type(config: dict[str, Any]) -> str | None:
    found = (text_part(config) or {}).get("model_type")
    return found if isinstance(found, str) else None


def _family(config: dict[str, Any]) -> str | None:
    try:
        return find_family(config).name
    except ValueError:  # an answer here: the checkpoint is of none
        return None


def _any_starts(names: Mapping[str, Any], prefix: str | tuple[str, ...]) -> bool:
    return any(name.startswith(prefix) for name in names)


def _float8(tensors: dict[str, TensorInfo], path: Path) -> str | None:
    if not any(DTYPE_NAMES[info.dtype].startswith("F8_") for info in tensors.values()):
        return None
    try:
        scheme = scheme_of_tensors(tensors, read_quantization_config(path))
    except CheckpointError as error:
        return f"unknown: {error}"
    return f"{scheme.format}, scales {scheme.scale_format}"
