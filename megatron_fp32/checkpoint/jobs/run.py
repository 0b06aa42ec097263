"""Runs a conversion as a job. A job has parts, which processes work on in any order, and which are never done twice."""

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

from megatron_fp32.checkpoint.formats.directory_checks import staging_directory
from megatron_fp32.checkpoint.jobs.staging import Staging, is_system_error, open_staging
from megatron_fp32.checkpoint.progress import ProgressCallback
from megatron_fp32.errors import CheckpointError

Tell = Callable[[str, int], None]
"""`tell(action, nbytes)`: a `ProgressCallback` without the total."""


Opener = Callable[[], contextlib.AbstractContextManager[Any]]
"""A function that opens a `Job`, and that can be pickled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One file of the output."""

    file: str
    """Path of the file in the output."""
    nbytes: int
    """Size in bytes of the tensors that are read for it."""


AnyPart = TypeVar("AnyPart", bound=Part)


class Job(Protocol[AnyPart]):
    """A conversion that is open in one process. The parts are equal in every process."""

    options: dict[str, Any]
    """The options of the conversion, as JSON."""
    sources: dict[str, Any]
    """results of `describe_directory` of the input, as JSON, taken before anything is read."""
    parts: Sequence[AnyPart]
    reopen: Opener
    """Opens this job in another process."""

    def run(self, part: AnyPart, path: Path, tell: Tell) -> dict[str, Any]:
        """Write a part to `path`, read it back, and return its record, as JSON."""

    def finish(self, staging: Staging, records: Sequence[dict[str, Any]]) -> None:
        """Write the files that depend on all parts. `records` are in the order of `parts`. May run twice."""


def run_job(
    job: Job[Any], out: Path, *, workers: int = 1, progress: ProgressCallback | None = None
) -> list[dict[str, Any]]:
    """Make `out`, or resume an earlier run that was interrupted.

    Args:
        job: the job. With several workers, each opens it again in its own process.
        out: the directory to make; it must not exist.
        workers: number of processes that write parts.
        progress: called after every tensor, and for parts that an earlier run has finished.

    Returns:
        The records of the parts.

    Raises:
        CheckpointError: from the job; when `out` exists; or when another process is making it.
        ChildProcessError: when a worker ends without an error message.
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
            if describe_directory(Path(before["directory"])) != before:
                raise CheckpointError(f"the {name} in {before['directory']} has changed during the conversion")
        staging.publish()
    return records


@contextlib.contextmanager
def _place_named(directory: Path) -> Iterator[None]:
    """Add the directory to an OSError without a file name, such as the errors of write and fsync."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(directory)) from error


def describe_directory(directory: Path) -> dict[str, Any]:
    """The path of a directory, and size and modification time of every file in it, for noticing changes."""
    files = {}
    for path in sorted(directory.rglob("*")):
        place = path.relative_to(directory)
        # Hidden folders belong to git, to download caches and to outputs that are not complete.
        if path.is_file() and not any(part.startswith(".") for part in place.parts[:-1]):
            files[str(place)] = [path.stat().st_size, path.stat().st_mtime_ns]
    return {"directory": str(directory.absolute()), "files": files}


def run_part(job: Job[Any], index: int, staging: Staging, tell: Tell) -> None:
    """Do one part, and record that it is done."""
    part = job.parts[index]
    with staging.file(part.file) as path:
        record = job.run(part, path, tell)
    staging.note(index, record)


def _in_processes(open_job: Opener, pending: list[int], staging: Staging, count: int, tell: Tell) -> None:
    # Spawned, because a forked process would have locks that threads of this process hold, but not the threads.
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
                    # If the worker has ended, the next recv raises EOFError.
                    with contextlib.suppress(BrokenPipeError):
                        pipe.send(index)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Block Ctrl-C for processes that start in the block. This process gets it after the block.

    Ctrl-C reaches all processes of a terminal. This process ends its workers, whose tracebacks would not help anybody.
    """
    # If the resource tracker started in the block, it would unblock the signal.
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
        if is_system_error(error) and not isinstance(error, OSError):
            # A pickled error loses its cause, so the parent could not tell that the machine caused it.
            error = OSError(str(error))
        _say(pipe, "failed", error)
    except BaseException as error:
        _say(pipe, "failed", RuntimeError(f"a worker failed: {error!r}"))
        raise


def _next_part(pipe: Connection) -> int | None:
    """Ask for the next part. None if there are no more parts, or the parent has ended."""
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
        # The parent has ended.
        sys.exit()


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    process.terminate()
    process.join()
