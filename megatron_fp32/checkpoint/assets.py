"""The files of a checkpoint that are no weights, such as config and tokenizer: found first, copied later.

`assets_of` looks at everything before any work is done. A link in a Hugging Face directory is followed within the
directory and, in a snapshot of the Hub's cache (`models--NAME/snapshots/REVISION`), to the cache's own `blobs`; its
content is copied. Any other link is an error: whoever wrote it could have named any file of this machine, which would
then be published with the export.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterable
from pathlib import Path, PurePath

from megatron_fp32.checkpoint.directory import refuse_pointers
from megatron_fp32.checkpoint.tensors import CheckpointError
from megatron_fp32.checkpoint.torch_dist import TRACKER

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
"""Ends of the names of weights."""

_MEGATRON = (".metadata", "metadata.json", TRACKER)

_GENERATED = ("config.json", "hf_quant_config.json")
"""Files that an export may write itself."""


def assets_of(directory: Path) -> list[PurePath]:
    """Files of a Hugging Face checkpoint that are no weights, and belong to no Megatron checkpoint inside of it.

    Args:
        directory: of the checkpoint.

    Returns:
        paths relative to the directory, sorted.

    Raises:
        CheckpointError: naming a link that leads nowhere, out of the directory, or to a directory; a file that is not a
            regular one; a file that cannot be read; a Git LFS pointer, which would be carried as if it were the file.
    """
    root = directory.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    return sorted(_found(directory, allowed))


def sidecar_assets_of(directory: Path) -> list[PurePath]:
    """Files that an import has put into a sidecar's `assets`.

    Raises:
        CheckpointError: as `assets_of`, and for names that an import never puts there: those of weights would take the
            place of exported ones.
    """
    if directory.is_symlink() or not directory.is_dir():
        raise CheckpointError(f"{directory} must be a directory, as an import makes it")
    for path, _, files in os.walk(directory, onerror=_raise):
        parts = Path(path).relative_to(directory).parts
        wrong = [name for name in (*parts, *files) if name.lower().endswith(WEIGHTS)]
        wrong += [name for name in parts[:1] if name.lower() in _GENERATED]
        wrong += [name for name in files if name.startswith(".unfinished-")]
        if wrong:
            raise CheckpointError(
                f"{path} holds {wrong[0]!r}: an import puts no weights among the assets, and an export writes its own. "
                "Delete it"
            )
    return sorted(_found(directory, [directory.resolve()]))


def copy_files(source: Path, places: Iterable[PurePath], target: Path) -> None:
    """Copy the content of files, in directories that are made where they do not exist."""
    target.mkdir(exist_ok=True)
    for place in places:
        (target / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / place, target / place)


def _found(directory: Path, allowed: list[Path]) -> list[PurePath]:
    places: list[PurePath] = []
    for path, folders, files in os.walk(directory, onerror=_raise):
        here = Path(path)
        is_top = here == directory
        if not is_top and _is_megatron(here, files):
            folders.clear()
            continue
        # Hidden folders are those of git and of download caches.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            if (here / name).is_symlink():
                raise CheckpointError(f"{here / name} is a link to a directory: remove it, or put a copy in its place")
        for name in files:
            if name.endswith((*WEIGHTS, ".distcp")) or (name in _MEGATRON and _is_megatron(here, files)):
                continue
            _check(here / name, allowed)
            places.append((here / name).relative_to(directory))
    refuse_pointers(directory / place for place in places)
    return places


def _is_megatron(directory: Path, files: Collection[str]) -> bool:
    """It holds a `torch_dist` checkpoint, names one, or is what an import left beside one."""
    is_checkpoint = ".metadata" in files or TRACKER in files or any(name.endswith(".distcp") for name in files)
    return is_checkpoint or (directory.name == "hf_source" and "source.json" in files)


def _check(path: Path, allowed: list[Path]) -> None:
    try:
        status = path.stat()
        real = path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is a link to {_target(path)}, which does not exist: download the file again, or remove the link"
        ) from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} must be a regular file, got a pipe, a socket or a device: remove it")
    if not any(real.is_relative_to(place) for place in allowed):
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {_target(path)}, outside of the directory: put a copy of the file in its place"
            )
        raise CheckpointError(f"{path} lies outside of {allowed[0]}")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} cannot be read: permission denied")


def _target(path: Path) -> str:
    return str(path.readlink())[:200] if path.is_symlink() else str(path)


def _raise(error: OSError) -> None:
    raise CheckpointError(f"{error.filename} cannot be listed: {error.strerror}") from None
