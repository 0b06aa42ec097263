"""Conversions as jobs: parts that processes work on by themselves, in any order, and that are never done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from megatron_fp32.checkpoint.formats.directory import staging_directory
from megatron_fp32.checkpoint.jobs.staging import Staging, is_the_machines, open_staging
from megatron_fp32.checkpoint.progress import ProgressCallback
from megatron_fp32.errors import CheckpointError

Tell = Callable[[str, int], None]
"""`ProgressCallback` without the total."""


Opener = Callable[[], contextlib.AbstractContextManager[Any]]
"""Opens a `Job`. It can be pickled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One file of the output."""

    file: str
    """Its path in the output."""
    nbytes: int
    """Of the tensors that make it."""


AnyPart = TypeVar("AnyPart", bound=Part)


class Job(Protocol[AnyPart]):
    """A conversion, open in one process. Every process finds the same parts."""

    options: dict[str, Any]
    """How it is converted, for JSON."""
    sources: dict[str, Any]
    """What is converted, for JSON, taken before any of it is read: `described` directories."""
    parts: Sequence[AnyPart]
    reopen: Opener
    """Opens the same job in another process."""

    def run(self, part: AnyPart, path: Path, tell: Tell) -> dict[str, Any]:
        """Write a part to a path, read it back, and say what there is to remember of it, for JSON."""

    def finish(self, staging: Staging, records: Sequence[dict[str, Any]]) -> None:
        """Write what depends on all parts; `records` are theirs, in order. May run again after a crash."""


def run_job(
    job: Job[Any], out: Path, *, workers: int = 1, progress: ProgressCallback | None = None
) -> list[dict[str, Any]]:
    """Make `out`, or go on where an earlier run ended.

    Args:
        job: what to do. Several workers open it once more, each in a process of its own.
        out: what is to be made; it must not exist.
        workers: how many processes write parts.
        progress: told of every tensor, and of those that an earlier run has done.

    Returns:
        The records of the parts.

    Raises:
        CheckpointError: from the job; when `out` exists, or somebody else is at work on it.
        ChildProcessError: when a worker ends without a word.
        ValueError: for fewer than one worker.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    total = sum(part.nbytes for part in job.parts)

    def tell(action: str, nbytes: int) -> None:
        if progress is not None:
            progress(action, nbytes, total)

    identity = {
        "version": 1,
        "job": type(job).__name__,
        "torch": torch.__version__,
        "options": job.options,
        "sources": job.sources,
    }
    with _place_named(staging_directory(out)), open_staging(out, identity) as staging:
        pending = []
        for index, part in enumerate(job.parts):
            if staging.record(index) is None or not (staging.output / part.file).is_file():
                pending.append(index)
                continue
            tell("write", part.nbytes)
            tell("verify", part.nbytes)
        if workers == 1 or len(pending) <= 1:
            for index in pending:
                run_part(job, index, staging, tell)
        else:
            _in_processes(job.reopen, pending, staging, min(workers, len(pending)), tell)
        records = [staging.record(index) or {} for index in range(len(job.parts))]
        job.finish(staging, records)
        for name, before in job.sources.items():
            if described(Path(before["directory"])) != before:
                raise CheckpointError(f"the {name} in {before['directory']} has changed while it was converted")
        staging.publish()
    return records


@contextlib.contextmanager
def _place_named(directory: Path) -> Iterator[None]:
    """Name the directory in an OSError that names no file, as those of write and fsync do not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(directory)) from error


def described(directory: Path) -> dict[str, Any]:
    """Path, and size and time of every file: enough to notice that a source is not what it was."""
    files = {}
    for path in sorted(directory.rglob("*")):
        place = path.relative_to(directory)
        # Hidden folders are those of git, of download caches, and of outputs that grow.
        if path.is_file() and not any(part.startswith(".") for part in place.parts[:-1]):
            files[str(place)] = [path.stat().st_size, path.stat().st_mtime_ns]
    return {"directory": str(directory.absolute()), "files": files}


def run_part(job: Job[Any], index: int, staging: Staging, tell: Tell) -> None:
    """Do one part, and note that it is done."""
    part = job.parts[index]
    with staging.file(part.file) as path:
        record = job.run(part, path, tell)
    staging.note(index, record)


def _in_processes(open_job: Opener, pending: list[int], staging: Staging, count: int, tell: Tell) -> None:
    # A fork would take over the locks of threads that it does not take over.
    context = multiprocessing.get_context("spawn")
    waiting = iter(pending)
    with contextlib.ExitStack() as stack:
        busy: dict[Any, Any] = {}
        for _ in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(open_job, staging, there), daemon=True)
            with _interrupts_blocked():
                process.start()
                stack.callback(_end, process, here)
            there.close()
            busy[here] = process
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                try:
                    kind, content = pipe.recv()
                except EOFError:
                    process = busy[pipe]
                    process.join()
                    raise ChildProcessError(
                        f"a worker ended with exit code {process.exitcode}; was there too little memory?"
                    ) from None
                if kind == "told":
                    tell(*content)
                elif kind == "failed":
                    raise content
                elif (index := next(waiting, None)) is None:
                    del busy[pipe]
                else:
                    # When nobody is there any more, the next recv says so.
                    with contextlib.suppress(BrokenPipeError):
                        pipe.send(index)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process that starts in the block never sees Ctrl-C; its parent sees it after the block.

    Ctrl-C reaches all processes of the terminal. This one ends the others, and a traceback of theirs would say nothing.
    """
    # Where it is started by the block, it unblocks what the block has blocked.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(open_job: Opener, staging: Staging, pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        with open_job() as job:
            while (index := _next_part(pipe)) is not None:
                run_part(job, index, staging, lambda *args: _say(pipe, "told", args))
    except (ValueError, OSError) as error:
        if is_the_machines(error) and not isinstance(error, OSError):
            # What is behind an error does not travel with it.
            error = OSError(str(error))
        _say(pipe, "failed", error)
    except BaseException as error:
        _say(pipe, "failed", RuntimeError(f"a worker failed: {error!r}"))
        raise


def _next_part(pipe: Connection) -> int | None:
    """Ask for work; None when there is no more, or nobody to ask."""
    try:
        pipe.send(("idle", None))
        index: int = pipe.recv()
    except (EOFError, BrokenPipeError):
        return None
    return index


def _say(pipe: Connection, kind: str, content: Any) -> None:
    try:
        pipe.send((kind, content))
    except BrokenPipeError:
        # Whoever began this is gone.
        sys.exit()


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    process.terminate()
    process.join()
