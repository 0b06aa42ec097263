"""Where an output grows: a directory beside it, found again after a crash, that becomes the output in one step.

`.NAME.partial/` holds `job.json` (what is being made, from what), `output/` (what there is of it), and `parts/` (a
record of every part that is complete and verified). A part gets its name, and then its record, only when it is on the
disk; so whenever a process ends, what bears a name is right.
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

from megatron_fp32.checkpoint.formats.directory import staging_directory
from megatron_fp32.checkpoint.formats.files import read_json_object
from megatron_fp32.errors import CheckpointError

_UNFINISHED = ".unfinished-"

_AFTER_DAMAGE = "what was done so far is deleted; run the same command again"


class Staging:
    """An output that is not complete yet. Made by `open_staging`."""

    def __init__(self, out: Path, root: Path) -> None:
        self._out, self._root = out, root
        self.output = root / "output"
        self.is_published = False
        self._parts = root / "parts"
        for directory in (self.output, self._parts):
            directory.mkdir(exist_ok=True)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[Path]:
        """A path to write to. When the block ends well, that file takes the place of `name` in the output."""
        target = self.output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # A process that outlived its parent may still be at work on the same part.
        path = target.with_name(f"{_UNFINISHED}{os.getpid()}-{target.name}")
        path.unlink(missing_ok=True)
        try:
            yield path
            path.rename(target)
        finally:
            path.unlink(missing_ok=True)

    def record(self, part: int) -> dict[str, Any] | None:
        """What was noted of a part; None when it is not complete.

        Raises:
            CheckpointError: naming the file, when it is not what was noted.
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
        """Say that a part is complete."""
        _write_at_once(self._record(part), json.dumps({"content": content, "xxh3_128": _digest(content)}))

    def publish(self) -> None:
        """Give the output its name."""
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
    """The staging directory of `out`, with what an earlier run of the same job left there.

    When the block fails because of what is converted (a ValueError with no OSError or MemoryError behind it), nothing
    is left. What is done stays there after everything else, such as a full disk, an interruption, or the end of the
    process: the same job goes on from there.

    Args:
        out: what is to be made.
        job: what it is made of, for JSON: another job does not go on with this one's parts.

    Raises:
        CheckpointError: when `out` exists, or another process or another job has the staging directory.
    """
    root = check_output(out)
    new_parents = [parent for parent in out.absolute().parents if not parent.exists()]
    root.mkdir(parents=True, exist_ok=True)
    with _locked(root):
        _refuse_others_files(root.rglob("*"))
        # Another process may have made it in the meantime.
        check_output(out)
        _begin(root, job)
        staging = Staging(out, root)
        try:
            yield staging
        except ValueError as error:
            if not is_the_machines(error):
                shutil.rmtree(root, ignore_errors=True)
                for parent in new_parents:
                    with contextlib.suppress(OSError):  # somebody else has put something there
                        parent.rmdir()
            raise
    if staging.is_published:
        # What is left of it does no harm, and a network file system keeps a file that was open a moment ago.
        shutil.rmtree(root, ignore_errors=True)


def check_output(out: Path) -> Path:
    """The staging directory of an output that can be made.

    Raises:
        CheckpointError: when `out` exists, be it as a link that leads nowhere; when it cannot be made in its place; or
            when something else has the name of its staging directory.
    """
    if out.name in ("", ".."):
        raise CheckpointError(f"{str(out)!r} must end in the name of a directory that does not exist")
    root = staging_directory(out)
    if root.is_symlink() or (root.exists() and not root.is_dir()):
        raise CheckpointError(f"{root} must be a directory, in which {out} grows: remove what has its name")
    parent = next(p for p in out.absolute().parents if os.path.lexists(p))
    if not parent.is_dir():
        raise CheckpointError(f"{out} cannot be made: {parent} is not a directory")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{out} cannot be made: you may not write to {parent}")
    if not os.path.lexists(out):
        return root
    if out.is_symlink() and not out.exists():
        raise CheckpointError(f"{out} is a link to {out.readlink()}, which does not exist: remove it, or name another")
    # What was left behind when a process ended between the last two steps.
    if (root / "job.json").is_file() and not (root / "output").exists():
        shutil.rmtree(root, ignore_errors=True)
    raise CheckpointError(f"{out} exists already: name a directory that does not exist")


def is_the_machines(error: BaseException) -> bool:
    """Whether a disk or the memory is behind an error that names the data."""
    links = (error.__cause__, error.__context__)
    return isinstance(error, (OSError, MemoryError)) or any(is_the_machines(link) for link in links if link)


def _begin(root: Path, job: dict[str, Any]) -> None:
    path = root / "job.json"
    text = json.dumps(job, indent=1, sort_keys=True)
    if not path.is_file():
        _write_at_once(path, text)
    elif path.read_bytes() != text.encode():
        raise CheckpointError(
            f"{root} holds parts of another conversion: the source, the options or the versions were others. Delete it "
            "to begin again"
        )
    _remove_unfinished(root)


def _remove_unfinished(root: Path) -> None:
    for left in root.glob(f"output/**/{_UNFINISHED}*"):
        left.unlink(missing_ok=True)


def _refuse_others_files(paths: Iterable[Path]) -> None:
    """No conversion puts links or pipes there: a link would be written through, a pipe waited for."""
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
            raise OSError(error.errno, f"no lock on {file.name}: the file system has none (flock)") from error
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
