"""The staging directory `.NAME.partial/`, in which an output grows until it is complete.

- `job.json`: the options and the input of the conversion.
- `output/`: the files that are complete. It is renamed to the output in one step.
- `parts/`: a record of every part that is complete and verified.

A file gets its final name, and then its part a record, only when it is on the disk. So whenever a process ends, every
file with a final name is right, and the next run resumes from there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from megatron_fp32.checkpoint.formats.directory_checks import staging_directory
from megatron_fp32.checkpoint.formats.json_file import read_json_object
from megatron_fp32.errors import CheckpointError

_UNFINISHED = ".unfinished-"

_AFTER_DAMAGE = "all finished parts are deleted; run the same command again"


class Staging:
    """The staging directory of an output that is not complete yet. `open_staging` makes it."""

    def __init__(self, out: Path, root: Path) -> None:
        self._out, self._root = out, root
        self.output = root / "output"
        self.is_published = False
        self._parts = root / "parts"
        for directory in (self.output, self._parts):
            directory.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A path to write to. If the block ends without an error, the file is renamed to `name` in the output."""
        target = self.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # The path has the process id, because a process that outlived its parent may still write the same part.
        path = target.with_name(f"{_UNFINISHED}{os.getpid()}-{target.name}")
        path.unlink(missing_ok=True)
        try:
            yield path
            path.rename(target)
        finally:
            path.unlink(missing_ok=True)

    def record(self, part: int) -> dict[str, Any] | None:
        """The record of a part; None if the part is not complete.

        Raises:
            CheckpointError: naming the file, when the record is damaged.
        """
        path = self._record(part)
        if not path.is_file():
            return None
        noted = read_json_object(path, "record of a part")
        content = noted.get("content")
        if not isinstance(content, dict) or noted.get("xxh3_128") != _digest(content):
            raise CheckpointError(f"{path} is damaged: {_AFTER_DAMAGE}")
        return content

    def note(self, part: int, content: dict[str, Any]) -> None:
        """Write the record of a part, which says that the part is complete."""
        _write_at_once(self._record(part), json.dumps({"content": content, "xxh3_128": _digest(content)}))

    def publish(self) -> None:
        """Rename the output to its final name."""
        _remove_unfinished(self._root)
        for path in (self.output, *self.output.rglob("*")):
            _sync(path)
        self.output.rename(self._out)
        self.is_published = True
        _sync(self._out.parent)

    def _record(self, part: int) -> Path:
        return self._parts / f"{part:06d}.json"


def _digest(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())


@contextlib.contextmanager
def open_staging(out: Path, job: dict[str, Any]) -> Iterator[Staging]:
    """Open the staging directory of `out`, with the parts that an earlier run of this job has finished.

    If the block fails because of the input (a ValueError that no OSError or MemoryError caused), the staging directory
    is deleted. After any other failure, such as a full disk or an interruption, finished parts stay, and the next run
    of this job resumes from there.

    Args:
        out: the directory to make.
        job: the options and the input of the conversion, as JSON. A job with other content does not use the parts.

    Raises:
        CheckpointError: when `out` exists, or another process or another job uses the staging directory.
    """
    root = check_output(out)
    new_parents = [parent for parent in out.absolute().parents if not parent.exists()]
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        _refuse_others_files(root.rglob("*"))
        # Another process may have made `out` in the meantime.
        check_output(out)
        _begin(root, job)
        staging = Staging(out, root)
        try:
            yield staging
        except ValueError as error:
            if not is_system_error(error):
                shutil.rmtree(root, ignore_errors=True)
                for parent in new_parents:
                    with contextlib.suppress(OSError):  # another process has written something there
                        parent.rmdir()
            raise
    if staging.is_published:
        # Errors are ignored, because leftovers do no harm, and a network file system keeps recently closed files.
        shutil.rmtree(root, ignore_errors=True)


def check_output(out: Path) -> Path:
    """Check that the directory `out` can be made, and return its staging directory.

    Raises:
        CheckpointError: when `out` exists, even as a broken link; when it cannot be made; or when its staging directory
            has the name of a file or a link.
    """
    if out.name in ("", ".."):
        raise CheckpointError(f"{str(out)!r} must end with the name of a directory that does not exist")
    root = staging_directory(out)
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise CheckpointError(
            f"{root} must be a directory, because it is the staging directory of {out}: remove the file or link"
        )
    parent = next(p for p in out.absolute().parents if os.path.lexists(p))
    if not parent.is_dir():
        raise CheckpointError(f"{out} cannot be made: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out} cannot be made: you may not write to {parent}")
    if not os.path.lexists(out):
        return root
    if out.is_symlink() and not out.exists():
        raise CheckpointError(
            f"{out} is a link to {out.readlink()}, which does not exist: remove the link, or pass another directory"
        )
    # A process that ended between the last two steps has left the staging directory.
    if (root / "job.json").is_file() and not (root / "output").exists():
        shutil.rmtree(root, ignore_errors=True)
    raise CheckpointError(f"{out} exists already: pass a directory that does not exist")


def is_system_error(error: BaseException) -> bool:
    """Whether the disk or the memory caused an error, even if the error itself names the data."""
    links = (error.__cause__, error.__context__)
    return isinstance(error, (OSError, MemoryError)) or any(is_system_error(link) for link in links if link)


def _begin(root: Path, job: dict[str, Any]) -> None:
    path = root / "job.json"
    text = json.dumps(job, indent=1, sort_keys=True)
    if not path.is_file():
        _write_at_once(path, text)
    elif path.read_bytes() != text.encode():
        raise CheckpointError(
            f"{root} holds parts of another conversion: the source, the options or the versions were different. "
            "Delete this directory to start again"
        )
    _remove_unfinished(root)


def _remove_unfinished(root: Path) -> None:
    for left in root.glob(f"output/**/{_UNFINISHED}*"):
        left.unlink(missing_ok=True)


def _refuse_others_files(paths: Iterable[Path]) -> None:
    """Refuse links, pipes and devices. A conversion never makes them, and would write through a link."""
    for path in paths:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError(
                f"{path} must be a regular file or a directory, got a link, a pipe or a device: remove it"
            )


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    lock = root / "lock"
    _refuse_others_files([lock] if os.path.lexists(lock) else [])
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"another process is at work in {root}") from None
        except OSError as error:
            raise OSError(
                error.errno, f"{file.name} cannot be locked: the file system does not support locks (flock)"
            ) from error
        yield


def _write_at_once(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
