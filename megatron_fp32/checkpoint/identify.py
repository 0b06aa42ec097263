"""Which kind of checkpoint a directory holds, and what of it is the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_fp32.checkpoint.formats.directory import (
    existing_directory,
    is_adapter_file,
    is_legacy,
    refuse_no_file,
    refuse_pointers,
    saved_iterations,
    why_no_checkpoint,
    why_no_config,
    why_no_weights,
)
from megatron_fp32.checkpoint.formats.files import read_json_object
from megatron_fp32.checkpoint.formats.huggingface import INDEX
from megatron_fp32.checkpoint.formats.torch_dist import TRACKER, find_checkpoint, known_non_model_entries
from megatron_fp32.checkpoint.sidecar import DIRECTORY, Sidecar, find_sidecar
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import TensorInfo

Kind = Literal["huggingface", "megatron"]


def kind_of(directory: str | Path) -> Kind:
    """Whether a directory holds safetensors or a `torch_dist` checkpoint.

    Raises:
        CheckpointError: when it holds neither, or both.
    """
    directory = existing_directory(directory)
    for name in (INDEX, "model.safetensors", ".metadata", TRACKER):
        refuse_no_file(directory / name)
    found: dict[Kind, bool] = {
        "huggingface": any((directory / name).is_file() for name in (INDEX, "model.safetensors")),
        "megatron": any((directory / name).is_file() for name in (".metadata", TRACKER)),
    }
    kinds = [kind for kind, is_there in found.items() if is_there]
    if len(kinds) > 1:
        raise CheckpointError(
            f"{directory} holds both kinds of checkpoint: expected either model.safetensors or {INDEX}, or .metadata "
            f"or {TRACKER}"
        )
    if not kinds:
        raise CheckpointError(_why_neither(directory))
    return kinds[0]


def _why_neither(directory: Path) -> str:
    if saved_iterations(directory) or is_legacy(directory) or any(directory.glob("*.distcp")):
        return why_no_checkpoint(directory, directory, directory / TRACKER)
    return f"{directory} holds no checkpoint: neither .metadata nor {TRACKER} is there, and {why_no_weights(directory)}"


def check_direction(command: str, directory: Path, expected: Kind, instead: str) -> None:
    """Raise where a conversion is given the kind of checkpoint that it makes.

    Args:
        command: that was called, such as "import".
        directory: what it is to convert.
        expected: the kind that it reads.
        instead: the command for the other kind, without the program's name.

    Raises:
        CheckpointError: for a directory that does not exist, or that holds the other kind of checkpoint alone.
    """
    existing_directory(directory)
    names = {path.name for path in directory.iterdir()}
    is_megatron = bool(names & {".metadata", TRACKER}) or bool(saved_iterations(directory))
    found: Kind | None = None
    if is_megatron and not names & {INDEX, "model.safetensors"}:
        found = "megatron"
    elif not is_megatron and names & {INDEX, "model.safetensors", "config.json"}:
        found = "huggingface"
    if found is None or found == expected:
        return
    labels = {"megatron": "Megatron", "huggingface": "Hugging Face"}
    raise CheckpointError(
        f"{directory} is a {labels[found]} checkpoint, and {command} reads a {labels[expected]} one. The command that "
        f"reads it is: megatron-fp32 {instead}"
    )


def model_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Of a `torch_dist` checkpoint's tensors, those of the model."""
    others = set(known_non_model_entries(tensors))
    return {name: info for name, info in tensors.items() if name not in others}


def adapter_files(hf_dir: Path) -> list[str]:
    """Names of an adapter's files in a directory, such as PEFT writes them."""
    names = sorted(path.name for path in hf_dir.glob("adapter_*"))
    return [name for name in names if is_adapter_file(name)]


def refuse_adapter(hf_dir: Path) -> None:
    """Refuse a directory with an adapter, which transformers would add to the weights beside it.

    Raises:
        CheckpointError: naming its files.
    """
    found = adapter_files(hf_dir)
    if found:
        raise CheckpointError(
            f"{hf_dir} holds an adapter ({', '.join(found)}): merge it into the full weights first (peft: "
            "merge_and_unload) and convert the result, or take its files out of the directory"
        )


def read_config(hf_dir: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face checkpoint, parsed.

    Raises:
        CheckpointError: when there is none, or it is not a JSON object.
    """
    path = hf_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(why_no_config(hf_dir))
    refuse_pointers([path])
    return read_json_object(path, finite=False)


def sidecar_of(megatron_dir: str | Path, source: str | Path | None = None) -> Sidecar | None:
    """The sidecar that `source` names, or that lies in or beside a Megatron checkpoint, or None where none lies.

    Raises:
        CheckpointError: when it is damaged, or `source` is none.
    """
    checkpoint = find_checkpoint(megatron_dir)
    if source is None and not any((place / DIRECTORY).exists() for place in (checkpoint, checkpoint.parent)):
        return None
    return find_sidecar(megatron_dir, source)
