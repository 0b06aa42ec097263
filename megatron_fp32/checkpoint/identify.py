"""Identify a checkpoint: Hugging Face or Megatron, its config, its sidecar, and the tensors that are weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from megatron_fp32.checkpoint.formats.directory_checks import (
    existing_directory,
    is_adapter_file,
    is_legacy,
    refuse_irregular_file,
    refuse_pointers,
    saved_iterations,
    why_no_checkpoint,
    why_no_config,
    why_no_weights,
)
from megatron_fp32.checkpoint.formats.huggingface import INDEX
from megatron_fp32.checkpoint.formats.json_file import read_json_object
from megatron_fp32.checkpoint.formats.torch_dist import TRACKER, find_checkpoint, known_non_model_entries
from megatron_fp32.checkpoint.sidecar import DIRECTORY, Sidecar, find_sidecar
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.tensors import TensorInfo

CheckpointKind = Literal["huggingface", "megatron"]


def checkpoint_kind(directory: str | Path) -> CheckpointKind:
    """Whether a directory holds a Hugging Face checkpoint (safetensors) or a Megatron checkpoint (`torch_dist`).

    Raises:
        CheckpointError: when it holds neither, or both.
    """
    directory = existing_directory(directory)
    for name in (INDEX, "model.safetensors", ".metadata", TRACKER):
        refuse_irregular_file(directory / name)
    found: dict[CheckpointKind, bool] = {
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
    return f"{directory} is not a checkpoint: it holds neither .metadata nor {TRACKER}, and {why_no_weights(directory)}"


def check_direction(command: str, directory: Path, expected: CheckpointKind, instead: str) -> None:
    """Refuse a checkpoint of the kind that a command writes instead of the kind that it reads.

    Args:
        command: the command, such as "import".
        directory: the directory to convert.
        expected: the kind of checkpoint that the command reads.
        instead: the command for the other kind, without the program's name.

    Raises:
        CheckpointError: for a directory that does not exist, or that only holds the other kind of checkpoint.
    """
    existing_directory(directory)
    names = {path.name for path in directory.iterdir()}
    is_megatron = bool(names & {".metadata", TRACKER}) or bool(saved_iterations(directory))
    found: CheckpointKind | None = None
    if is_megatron and not names & {INDEX, "model.safetensors"}:
        found = "megatron"
    elif not is_megatron and names & {INDEX, "model.safetensors", "config.json"}:
        found = "huggingface"
    if found is None or found == expected:
        return
    labels = {"megatron": "Megatron", "huggingface": "Hugging Face"}
    raise CheckpointError(
        f"{directory} is a {labels[found]} checkpoint, but {command} reads a {labels[expected]} checkpoint. The "
        f"command that reads it is: megatron-fp32 {instead}"
    )


def model_tensors(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of the model among the tensors of a `torch_dist` checkpoint."""
    others = set(known_non_model_entries(tensors))
    return {name: info for name, info in tensors.items() if name not in others}


def adapter_files(hf_dir: Path) -> list[str]:
    """Names of the files in a directory that belong to an adapter, as PEFT names them."""
    names = sorted(path.name for path in hf_dir.glob("adapter_*"))
    return [name for name in names if is_adapter_file(name)]


def refuse_adapter(hf_dir: Path) -> None:
    """Refuse a directory with an adapter, because transformers would add the adapter to the weights.

    Raises:
        CheckpointError: naming the files of the adapter.
    """
    found = adapter_files(hf_dir)
    if found:
        raise CheckpointError(
            f"{hf_dir} holds an adapter ({', '.join(found)}): merge it into the full weights first (peft: "
            "merge_and_unload) and convert the result, or remove the adapter's files from the directory"
        )


def read_config(hf_dir: Path) -> dict[str, Any]:
    """The `config.json` of a Hugging Face checkpoint, parsed.

    Raises:
        CheckpointError: when the file does not exist, or does not hold a JSON object.
    """
    path = hf_dir / "config.json"
    if not path.is_file():
        raise CheckpointError(why_no_config(hf_dir))
    refuse_pointers([path])
    return read_json_object(path, finite=False)


def sidecar_of(megatron_dir: str | Path, source: str | Path | None = None) -> Sidecar | None:
    """The sidecar in `source`, or in or next to a Megatron checkpoint; None if there is none and `source` is None.

    Raises:
        CheckpointError: when the sidecar is damaged, or there is none in `source`.
    """
    checkpoint = find_checkpoint(megatron_dir)
    if source is None and not any((place / DIRECTORY).exists() for place in (checkpoint, checkpoint.parent)):
        return None
    return find_sidecar(megatron_dir, source)
