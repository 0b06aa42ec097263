"""A pool of ranks for a whole test run.

Starting a rank takes 6 to 10 seconds, mostly for imports. A pool starts its processes once, connects them in a process
group, and runs one function after another on all of them.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import socket
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_fp32.validation import check_callable, check_choice, check_count, check_number


class RankError(RuntimeError):
    """A function raised or hung on at least one rank. The message has the traceback of each such rank."""


class RankPool:
    """`world_size` processes in one process group.

    Use it as a context manager, or call `close`. After an error, the next `run` starts new ranks, because the old ones
    may hang in a collective that the failed rank has left.

    Args:
        world_size: number of ranks.
        backend: `"gloo"`, or `"nccl"` with one GPU for each rank.
        timeout: seconds that one `run` may take before the ranks are ended.
        setup: context manager that every rank enters once, such as `cpu_megatron`. It must be importable.
    """

    def __init__(
        self,
        world_size: int,
        *,
        backend: str = "gloo",
        timeout: float = 240.0,
        setup: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        check_count("world_size", world_size)
        check_choice("backend", backend, ("gloo", "nccl"))
        check_number("timeout", timeout, positive=True)
        check_callable("setup", setup)
        self.world_size = world_size
        self._backend = backend
        self._timeout = timeout
        self._setup = setup
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        # At exit, multiprocessing joins its children, but the ranks wait for requests, so they must be ended first.
        # They cannot be daemons, because megatron-core's checkpoint writer starts processes of its own. atexit calls
        # the last registered function first, so this one runs before multiprocessing's.
        self._at_exit = weakref.finalize(self, _end, self._processes, self._pipes)
        self._at_exit.atexit = False
        atexit.register(self._at_exit)

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Run `function(*args, **kwargs)` on every rank, and return the results in the order of the ranks.

        The function, its arguments and its results are pickled, so the function must be importable.

        Raises:
            RankError: when a rank raised, died, or did not answer in time.
        """
        if not self._processes:
            self._start()
        try:
            return self._run(pickle.dumps((function, args, kwargs)))
        except BaseException:
            # Ranks may still be running, and their answers must not reach the next run.
            self.close()
            raise

    def _run(self, request: bytes) -> list[Any]:
        # Plain pickle copies tensors. multiprocessing's pickle would share memory that ends with its process.
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # below, a rank that died since the last run gives EOFError
                pipe.send_bytes(request)
        results: list[Any] = [None] * self.world_size
        failures: dict[int, str] = {}
        deadline = time.monotonic() + self._timeout
        waiting = dict(enumerate(self._pipes))
        while waiting and not (failures and time.monotonic() > deadline):
            ready = multiprocessing.connection.wait(list(waiting.values()), max(0.0, deadline - time.monotonic()))
            if not ready:
                failures.update({rank: f"no answer within {self._timeout:g} s" for rank in waiting})
                break
            for rank in [r for r, pipe in waiting.items() if pipe in ready]:
                try:
                    ok, answer = pickle.loads(waiting.pop(rank).recv_bytes())
                except (EOFError, ConnectionError):
                    ok, answer = False, "the process died"
                if ok:
                    results[rank] = answer
                else:
                    failures[rank] = answer
                    # The other ranks may wait for this rank in a collective for ever.
                    deadline = min(deadline, time.monotonic() + 5.0)
        if failures:
            raise RankError("\n".join(f"rank {rank}: {text}" for rank, text in sorted(failures.items())))
        return results

    def close(self) -> None:
        """End the processes."""
        _end(self._processes, self._pipes)

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        handle, store = tempfile.mkstemp(prefix="megatron_fp32_ranks_")
        os.close(handle)
        for rank in range(self.world_size):
            pool_end, rank_end = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.world_size, store, rank_end, self._setup, self._backend, self._timeout)
            )
            process.start()
            rank_end.close()
            self._processes.append(process)
            self._pipes.append(pool_end)


def _end(processes: list[Any], pipes: list[Connection]) -> None:
    for pipe in pipes:
        pipe.close()  # an idle rank leaves its loop
    patience = time.monotonic() + 10.0
    for process in processes:
        process.join(max(0.0, patience - time.monotonic()))
        if process.is_alive():
            # The rank leads a session, so the signal also reaches the processes that it started.
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # the rank has not called setsid yet
                process.kill()
            process.join()
    processes.clear()
    pipes.clear()


def _serve(
    rank: int,
    world_size: int,
    store: str,
    pipe: Connection,
    setup: Callable[[], contextlib.AbstractContextManager[Any]],
    backend: str,
    timeout: float,
) -> None:
    os.setsid()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME=_loopback())
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend,
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout),
    )
    with setup():
        while True:
            try:
                request = pipe.recv_bytes()
            except EOFError:
                return
            try:
                function, args, kwargs = pickle.loads(request)
                answer = pickle.dumps((True, function(*args, **kwargs)))
            except BaseException:
                answer = pickle.dumps((False, traceback.format_exc()))
            pipe.send_bytes(answer)


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else names[0]
