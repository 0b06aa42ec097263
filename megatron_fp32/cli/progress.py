"""How far a command has come: bars on a terminal, and a plain line now and then in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megatron_fp32.checkpoint.progress import ProgressCallback

INTERVAL = 30.0
"""Seconds between two lines in a log."""


@contextlib.contextmanager
def progress() -> Iterator[ProgressCallback]:
    """Bars where stderr is a terminal. Elsewhere a line every `INTERVAL` seconds: a job that ends sooner has none."""
    stderr = Console(stderr=True)
    if not stderr.is_terminal:
        yield LogLines(lambda line: click.echo(f"megatron-fp32: {line}", err=True)).tell
        return
    columns = (
        TextColumn("{task.description:>7}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stderr) as bars:
        tasks = {}

        def tell(action: str, nbytes: int, total: int) -> None:
            if action not in tasks:
                tasks[action] = bars.add_task(action, total=total)
            bars.update(tasks[action], advance=nbytes)

        yield tell


class LogLines:
    """A line about a job every `interval` seconds, when something is told.

    Args:
        write: takes a line, without its end.
        clock: the time in seconds.
        interval: seconds from one line to the next.
    """

    def __init__(
        self, write: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic, interval: float = INTERVAL
    ) -> None:
        self._write, self._clock, self._interval = write, clock, interval
        self._begin = self._last = clock()
        self._done: dict[str, int] = {}
        self._total = 0
        self._slowest_before: int | None = None

    def tell(self, action: str, nbytes: int, total: int) -> None:
        """Take in what was done; see `ProgressCallback`."""
        self._done[action] = self._done.get(action, 0) + nbytes
        self._total = total
        now = self._clock()
        if now - self._last >= self._interval:
            self._write(self._line(now))
            self._last, self._slowest_before = now, min(self._done.values())

    def _line(self, now: float) -> str:
        parts = [f"{duration(now - self._begin)}:"]
        parts += [
            f"{action} {size(done)} of {size(self._total)} ({100 * done // max(self._total, 1)}%),"
            for action, done in self._done.items()
        ]
        # The first line gives no speed: an earlier run may have done most of what it counts.
        if self._slowest_before is not None:
            slowest = min(self._done.values())
            speed = (slowest - self._slowest_before) / (now - self._last)
            parts.append(f"{size(speed)}/s,")
            if speed > 0:
                parts.append(f"about {duration((self._total - slowest) / speed)} left,")
        return " ".join(parts).removesuffix(",")


def size(nbytes: float) -> str:
    """Bytes in the largest unit of which there is one: `1.5 GB`."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} bytes"


def duration(seconds: float) -> str:
    """Seconds in a unit that fits: `45 s`, `12 min`, `3.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 120 * 60 else f"{seconds / 3600:.1f} h"
