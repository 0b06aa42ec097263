"""Reads written tensors back from the disk and compares them, in a second thread a little behind the writer."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from torch import Tensor

from megatron_fp32.checkpoint.formats.digests import Digests, compare
from megatron_fp32.checkpoint.formats.safetensors_writer import SafetensorsFile
from megatron_fp32.checkpoint.formats.section import to_disk
from megatron_fp32.checkpoint.jobs.run import Tell
from megatron_fp32.weights.tensors import TensorInfo

Check = Callable[[], None]
"""Reads a tensor back, and raises CheckpointError if it differs from the written tensor."""

_BATCH = 1 << 28
"""Bytes that are written to the disk together. The second thread is at most two batches behind."""


class ReadBack:
    """Writes a growing file to the disk, drops it from the page cache, and reads it back, in a second thread.

    Writing into the cache and waiting for the disk take about equally long, so each thread does one of them.

    Args:
        path: path of the file.
        tell: called with the number of compared bytes, in the thread that calls `add` and `finish`.
    """

    def __init__(self, path: Path, tell: Callable[[int], None]) -> None:
        self._path, self._tell = path, tell
        self._thread = ThreadPoolExecutor(1)
        self._running: collections.deque[tuple[int, Future[None]]] = collections.deque()
        self._checks: list[Check] = []
        self._nbytes = 0

    def add(self, nbytes: int, check: Check) -> None:
        """Add a check of `nbytes` bytes that were written and flushed. Raises the error of an earlier check."""
        self._checks.append(check)
        self._nbytes += nbytes
        if self._nbytes >= _BATCH:
            self._begin()
            self._wait(behind=1)

    def finish(self) -> None:
        """Wait until everything is compared. Raises the error of a check."""
        if self._checks:
            self._begin()
        self._wait(behind=0)

    def _begin(self) -> None:
        self._running.append((self._nbytes, self._thread.submit(_compare, self._path, self._checks)))
        self._checks, self._nbytes = [], 0

    def _wait(self, *, behind: int) -> None:
        while len(self._running) > behind:
            nbytes, future = self._running.popleft()
            future.result()
            self._tell(nbytes)

    def __enter__(self) -> ReadBack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)


class SafetensorsPart:
    """A safetensors file that is a part of a `Job`. Every tensor is read back and compared.

    Args:
        path, tensors: see `SafetensorsFile`.
        digests: gets the digests of written tensors.
        tell: called with the number of written bytes, and of compared bytes.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo], digests: Digests, tell: Tell) -> None:
        self._path, self._digests, self._tell = path, digests, tell
        self._file = SafetensorsFile(path, tensors)
        self._read_back = ReadBack(path, functools.partial(tell, "verify"))

    def write(self, name: str, tensor: Tensor, index: tuple[int, ...] = ()) -> None:
        """See `SafetensorsFile.write`."""
        self._file.write(name, tensor, index=index)
        expected = self._digests.add(name, tensor, index)
        self._tell("write", tensor.nbytes)
        self._read_back.add(tensor.nbytes, functools.partial(self._check, name, index, expected))

    def finish(self) -> None:
        """Wait until everything is compared and on the disk. See `SafetensorsFile.finish` for errors."""
        self._read_back.finish()
        self._file.finish(durable=True)

    def _check(self, name: str, index: tuple[int, ...], expected: str) -> None:
        compare(self._file.digest(name, index), expected, self._path, name)

    def __enter__(self) -> SafetensorsPart:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._read_back.__exit__(kind, error, trace)


def _compare(path: Path, checks: list[Check]) -> None:
    to_disk(path)
    for check in checks:
        check()
