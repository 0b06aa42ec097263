"""Messages for directories that are not the expected checkpoint: what is in them, and what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_fp32.errors import CheckpointError

_POINTER = b"version https://git-lfs.github.com/spec/"

_POINTER_LIMIT = 1024
"""A Git LFS pointer has fewer bytes (github.com/git-lfs/git-lfs, docs/spec.md)."""

HUB_ID = re.compile(
    r"(?:(?:https?:)?/*(?:www\.)?(?:huggingface\.co|hf\.co)/+|hf:/+)?"
    r"(?P<repository>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(?:@(?P<tag>[\w./-]+)|/tree/(?P<tree>[\w.-]+)/?|/)?"
)
"""Matches the id or address of a Hugging Face repository, with or without a branch, a tag or a commit."""

_ITERATION = re.compile(r"iter_\d{7,}|release")


def existing_directory(path: str | Path) -> Path:
    """The path of an existing directory.

    Raises:
        CheckpointError: when the directory does not exist. If the path looks like the id of a Hugging Face repository,
            the message has the command to download it.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise CheckpointError(why_no_directory(path))
    return directory


def why_no_directory(path: str | Path) -> str:
    """The message for a path that is not a directory."""
    what = "is a file, not a directory" if os.path.lexists(path) and Path(path).is_file() else "does not exist"
    if os.path.islink(path) and not os.path.exists(path):
        what = f"is a link to {os.readlink(path)}, which does not exist"
    return f"{path} {what}{hub_hint(path)}"


def hub_hint(path: str | Path) -> str:
    """How to download a path that looks like the id or address of a Hugging Face repository; empty for other paths."""
    found = HUB_ID.fullmatch(str(path))
    if found is None or os.path.lexists(path):
        return ""
    repository, revision = found["repository"], found["tag"] or found["tree"]
    name = repository.rpartition("/")[2]
    return (
        f". If it is the id of a Hugging Face repository, download the repository first: hf download {repository} "
        f"{f'--revision {revision} ' if revision else ''}--local-dir {name}; then pass {name}"
    )


def staging_directory(out: Path) -> Path:
    """The staging directory `.NAME.partial`, in which the directory `out` grows until it is complete."""
    return out.parent / f".{out.name}.partial"


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer, which Git LFS leaves in place of a file that is not downloaded."""
    if not path.is_file() or path.stat().st_size >= _POINTER_LIMIT:
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def link_target(path: Path) -> str:
    """The target of a link, cut after 200 characters; the path itself if it is not a link."""
    return os.readlink(path)[:200] if path.is_symlink() else str(path)


def is_adapter_file(name: str) -> bool:
    """Whether a file has a name that PEFT gives to a file of an adapter, and that transformers looks for."""
    return name == "adapter_config.json" or name.startswith(("adapter_model.", "adapter_model-"))


def refuse_irregular_file(path: Path) -> None:
    """Refuse a path that exists but cannot be read as a file. Nothing is opened.

    Raises:
        CheckpointError: for a broken link, with its target; and for a directory, a pipe, a socket or a device.
    """
    if os.path.isfile(path) or not os.path.lexists(path):
        return
    if os.path.exists(path):
        raise CheckpointError(f"{path} must be a regular file, got a directory, a pipe, a socket or a device")
    raise CheckpointError(
        f"{path} is a link to {link_target(path)}, which cannot be reached: download the file again, or remove the link"
    )


def refuse_pointers(paths: Iterable[Path]) -> None:
    """Refuse files that are only Git LFS pointers.

    Raises:
        CheckpointError: naming the first pointer, and the command that downloads the real files.
    """
    pointers = [path for path in paths if is_pointer(path)]
    if pointers:
        more = f" (and {len(pointers) - 1} more files are)" if len(pointers) > 1 else ""
        raise CheckpointError(
            f"{pointers[0]} is a Git LFS pointer, not the file itself{more}: run `git lfs pull` in {pointers[0].parent}"
        )


def saved_iterations(root: Path) -> list[str]:
    """Names of the directories in `root` that Megatron saves checkpoints in, such as `iter_0000010` or `release`."""
    if not root.is_dir():
        return []
    return sorted(path.name for path in root.iterdir() if _ITERATION.fullmatch(path.name) and path.is_dir())


def is_legacy(directory: Path) -> bool:
    """Whether the directory holds a checkpoint in Megatron's legacy format, with one pickle for each rank."""
    return any(directory.glob("mp_rank_*/*.pt"))


def snapshot_hint(directory: Path) -> str:
    """Which directory to pass instead of a folder of the Hugging Face cache; empty for other directories."""
    snapshots = sorted(path for path in directory.glob("snapshots/*") if path.is_dir())
    if not snapshots:
        return ""
    return f"it is a folder of the Hugging Face cache; pass the snapshot in it, such as {snapshots[-1]}"


def why_no_config(directory: Path) -> str:
    """The message for an expected Hugging Face checkpoint without `config.json`."""
    return f"no config.json in {directory}: {snapshot_hint(directory) or 'is it a Hugging Face model directory?'}"


def why_no_weights(directory: Path) -> str:
    """The message for an expected Hugging Face checkpoint without safetensors files that can be read."""
    message = f"{directory} holds neither model.safetensors nor model.safetensors.index.json"
    if hint := snapshot_hint(directory):
        return f"{message}: {hint}"
    other = sorted(path.name for end in ("bin", "pt", "pth", "gguf", "h5") for path in directory.glob(f"*.{end}"))
    if other:
        return (
            f"{message}: its weights are in another format ({other[0]}). Save it as safetensors first, with "
            "save_pretrained of transformers"
        )
    sharded = sorted(path.name for path in directory.glob("*.safetensors"))
    if sharded:
        return (
            f"{message}, but it holds {sharded[0]}{' and others' if len(sharded) > 1 else ''}: files with other names "
            "need an index that lists them"
        )
    return message


def why_no_checkpoint(path: Path, root: Path, tracker: Path) -> str:
    """The message for an expected Megatron checkpoint without `.metadata`.

    Args:
        path: the directory that was given.
        root: the directory without `.metadata`: `path`, or the one that the tracker file names.
        tracker: the path of the tracker file, which need not exist.
    """
    if is_legacy(root):
        return (
            f"{root} holds a checkpoint in Megatron's legacy format (mp_rank_*): load it in Megatron with "
            "--ckpt-convert-format torch_dist --ckpt-convert-save DIR, and pass that directory"
        )
    if root != path:
        named = "'release'" if root.name == "release" else f"iteration {int(root.name.removeprefix('iter_'))}"
        problem = f"there is no {root.name}"
        if root.is_dir():
            problem = f"{root} is incomplete: it has no .metadata, which a save writes last"
        return f"{tracker} names {named}, but {problem}; {complete_ones(path)}"
    if saved_iterations(path):
        return f"{path} has no tracker file {tracker.name}, which names the checkpoint to use; {complete_ones(path)}"
    if any(path.glob("*.distcp")) or _ITERATION.fullmatch(path.name):
        return f"{path} is an incomplete checkpoint: it has no .metadata, which a save writes last"
    return f"{path} is not a Megatron torch_dist checkpoint (found neither {path / '.metadata'} nor {tracker})"


def complete_ones(path: Path) -> str:
    """A list, for messages, of the complete checkpoints in a directory, with one of them to pass."""
    complete = [name for name in saved_iterations(path) if (path / name / ".metadata").is_file()]
    if not complete:
        others = saved_iterations(path)
        return f"there is {', '.join(others[-8:])}, without .metadata" if others else "there is no other checkpoint"
    left = f" and {len(complete) - 8} more" if len(complete) > 8 else ""
    return f"there is {', '.join(complete[-8:])}{left}. Pass one of them, such as {path / complete[-1]}"
