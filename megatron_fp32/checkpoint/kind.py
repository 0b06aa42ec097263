"""Which kind of checkpoint a directory holds, and what of it is the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_fp32.checkpoint.files import read_json_object
from megatron_fp32.checkpoint.huggingface import INDEX, CheckpointError, TensorInfo
from megatron_fp32.checkpoint.sidecar import DIRECTORY, Sidecar, find_sidecar
from megatron_fp32.checkpoint.torch_dist import TRACKER, find_checkpoint, known_non_model_entries

Kind = Literal["huggingface", "megatron"]


def kind_of(directory: str | Path) -> Kind:
    """Whether a directory holds safetensors or a `torch_dist` checkpoint.

    Raises:
        CheckpointError: when it holds neither, or both.
    """
    directory = Path(directory)
    found: dict[Kind, bool] = {
        "huggingface": any((directory / name).is_file() for name in (INDEX, "model.safetensors")),
        "megatron": any((directory / name).is_file() for name in (".metadata", TRACKER)),
    }
    kinds = [kind for kind, is_there in found.items() if is_there]
    if len(kinds) != 1:
        wrong = "both kinds of checkpoint" if kinds else "no checkpoint"
        raise CheckpointError(
            f"{directory} holds {wrong}: expected either model.safetensors or {INDEX}, or .metadata or {TRACKER}"
        )
    return kinds[0]


def model_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Of a `torch_dist` checkpoint's tensors, those of the model."""
    others = set(known_non_model_entries(tensors))
    return {name: info for name, info in tensors.items() if name not in others}


def read_config(hf_dir: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face checkpoint, parsed.

    Raises:
        CheckpointError: when there is none, or it is no JSON object.
    """
    path = hf_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {path.name} cannot be read")
    return read_json_object(path)


def sidecar_of(megatron_dir: str | Path, source: str | Path | None = None) -> Sidecar | None:
    """The sidecar that `source` names, or that lies in or beside a Megatron checkpoint, or None where none lies.

    Raises:
        CheckpointError: when it is damaged, or `source` is none.
    """
    checkpoint = find_checkpoint(megatron_dir)
    if source is None and not any((place / DIRECTORY).exists() for place in (checkpoint, checkpoint.parent)):
        return None
    return find_sidecar(megatron_dir, source)
