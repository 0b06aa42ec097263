"""Conversions as jobs: parts that processes work on by themselves, in any order, and that are never done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import signal
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_fp32.checkpoint.huggingface import CheckpointError
from megatron_fp32.checkpoint.staging import Staging, open_staging

Progress = Callable[[str, int, int], None]
"""Called after each tensor with what was done to it, its size, and the size of all tensors that it is done to."""

Tell = Callable[[str, int], None]
"""The same without the total."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One file of the output."""

    file: str
    """Its path in the output."""
    nbytes: int
    """Of the tensors that make it."""
    steps: Any
    """What the job knows of it."""


class Job(Protocol):
    """A conversion, open in one process. Every process finds the same parts."""

    identity: dict[str, Any]
    """What is converted and how, for JSON: two jobs with the same make the same bytes."""
    parts: Sequence[Part]

    def run(self, part: Part, path: Path, tell: Tell) -> dict[str, Any]:
        """Write a part to a path, read it back, and say what there is to remember of it, for JSON."""

    def finish(self, staging: Staging, records: Sequence[dict[str, Any]]) -> None:
        """Write what depends on all parts; `records` are theirs, in order. May run again after a crash."""


Opener = Callable[[], contextlib.AbstractContextManager[Any]]
"""Opens a `Job`; can be pickled where there are several workers."""


def run_job(
    job: Job, open_job: Opener, out: Path, *, workers: int = 1, progress: Progress | None = None
) -> list[dict[str, Any]]:
    """Make `out`, or go on where an earlier run ended.

    Args:
        job: what to do.
        open_job: opens it once more, for each worker where there are several, in a process of its own.
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

    with open_staging(out, job.identity) as staging:
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
            _in_processes(open_job, pending, staging, min(workers, len(pending)), tell)
        records = [staging.record(index) or {} for index in range(len(job.parts))]
        job.finish(staging, records)
        staging.publish()
    return records


def run_part(job: Job, index: int, staging: Staging, tell: Tell) -> None:
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
            process.start()
            there.close()
            stack.callback(_end, process, here)
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
                    pipe.send(index)


def _serve(open_job: Opener, staging: Staging, pipe: Connection) -> None:
    # Ctrl-C reaches all processes of the terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        with open_job() as job:
            pipe.send(("idle", None))
            while True:
                run_part(job, pipe.recv(), staging, lambda *args: pipe.send(("told", args)))
                pipe.send(("idle", None))
    except (EOFError, BrokenPipeError):
        # Whoever began this is gone, or has no more work.
        return
    except (CheckpointError, ValueError, OSError) as error:
        pipe.send(("failed", error))
    except BaseException as error:
        pipe.send(("failed", RuntimeError(f"a worker failed: {error!r}")))
        raise


def _end(process: Any, pipe: Connection) -> None:
    pipe.close()
    process.terminate()
    process.join()
