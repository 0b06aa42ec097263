"""Assets: the files of a checkpoint that do not hold weights, such as config and tokenizer.

`assets_of` checks all assets before any work is done. A link is followed if its target is in the Hugging Face
directory, or, for a snapshot of the Hub's cache (`models--NAME/snapshots/REVISION`), in the cache's `blobs`. The
content of the target is copied. Any other link is an error, because it could refer to any file of this machine, which
an export would then publish.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable
from pathlib import Path, PurePath

from megatron_fp32.checkpoint.formats.directory_checks import is_adapter_file, link_target, refuse_pointers
from megatron_fp32.checkpoint.formats.torch_dist import TRACKER
from megatron_fp32.checkpoint.quantization_entries import QUANTIZATION_FILES
from megatron_fp32.errors import CheckpointError

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5")
"""Ends of the names of files with weights."""

_MEGATRON = (".metadata", "metadata.json", TRACKER)

_ITERATION = re.compile(r"iter_\d{7,}")

_GENERATED = ("config.json", *QUANTIZATION_FILES)
"""Files that a conversion may write or remove."""


def assets_of(directory: Path) -> list[PurePath]:
    """The assets of a Hugging Face checkpoint. Files of Megatron checkpoints in its subdirectories are left out.

    Args:
        directory: the directory of the checkpoint.

    Returns:
        Paths relative to the directory, sorted.

    Raises:
        CheckpointError: naming a link that is broken, leaves the directory or refers to a directory; a file that is not
            a regular file or cannot be read; or a Git LFS pointer.
    """
    root = directory.resolve()
    allowed = [root, (root.parent.parent / "blobs").resolve()] if root.parent.name == "snapshots" else [root]
    return sorted(_found(directory, allowed))


def sidecar_assets_of(directory: Path) -> list[PurePath]:
    """The files in the `assets` directory of a sidecar.

    Raises:
        CheckpointError: see `assets_of`; and for names that an import never writes there. For example, a file with
            weights would replace an exported file.
    """
    if directory.is_symlink() or not directory.is_dir():
        raise CheckpointError(f"{directory} must be a directory that an import made")
    for path, _, files in os.walk(directory, onerror=_raise):
        parts = Path(path).relative_to(directory).parts
        wrong = [name for name in (*parts, *files) if name.lower().endswith(WEIGHTS)]
        wrong += [name for name in files if name.startswith(".unfinished-") or (not parts and is_adapter_file(name))]
        if wrong:
            raise CheckpointError(
                f"{path} holds {wrong[0]!r}, but an import writes neither weights nor an adapter into assets/: delete "
                "that file"
            )
    return sorted(_found(directory, [directory.resolve()]))


def copy_files(source: Path, places: Iterable[PurePath], target: Path) -> None:
    """Copy files, and make the directories that they need.

    Args:
        source: the directory to copy from.
        places: paths of the files, relative to `source`.
        target: the directory to copy to.
    """
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
        # Hidden folders belong to git and to download caches.
        folders[:] = sorted(n for n in folders if not n.startswith(".") and not n.lower().endswith(WEIGHTS))
        for name in folders:
            if is_top and name.lower() in _GENERATED:
                raise CheckpointError(f"{here / name} is a directory with the name of a file: rename or remove it")
            if (here / name).is_symlink():
                raise CheckpointError(f"{here / name} is a link to a directory: remove it, or replace it by a copy")
        for name in files:
            if name.lower().endswith((*WEIGHTS, ".distcp")) or (name in _MEGATRON and _is_megatron(here, files)):
                continue
            _check(here / name, allowed)
            places.append((here / name).relative_to(directory))
    refuse_pointers(directory / place for place in places)
    return places


def _is_megatron(directory: Path, files: Collection[str]) -> bool:
    """Whether a directory holds a `torch_dist` checkpoint or a tracker file, or is a sidecar."""
    if ".metadata" in files or TRACKER in files or any(name.endswith(".distcp") for name in files):
        return True
    # A directory with the name of an iteration may be a checkpoint without metadata.
    return (directory.name == "hf_source" and "source.json" in files) or _ITERATION.fullmatch(
        directory.name
    ) is not None


def _check(path: Path, allowed: list[Path]) -> None:
    try:
        status = path.stat()
        real = path.resolve(strict=True)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is a link to {link_target(path)}, which does not exist: download the file again, or remove the "
            "link"
        ) from None
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be read: {str(error)[:200]}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} must be a regular file, got a pipe, a socket or a device: remove it")
    if not any(real.is_relative_to(place) for place in allowed):
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link to {link_target(path)}, outside of the directory: replace it by a copy of the file"
            )
        raise CheckpointError(f"{path} lies outside of {allowed[0]}")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} cannot be read: permission denied")


def _raise(error: OSError) -> None:
    raise CheckpointError(f"{error.filename} cannot be listed: {error.strerror}") from None
