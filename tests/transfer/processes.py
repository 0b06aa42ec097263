"""A trainer and workers in processes of their own: what each does wrong is a part of the plan."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_fp32.errors import TransferError
from megatron_fp32.transfer import channels
from megatron_fp32.transfer.manifest import Manifest
from megatron_fp32.transfer.receiver import Receiver, _Proofs
from megatron_fp32.transfer.rendezvous import Invitation, open_store
from megatron_fp32.transfer.sender import Connection, Push
from megatron_fp32.weights.tensors import DTYPES, info_of

CPU = torch.device("cpu")
ATTENDED = "megatron_fp32"
"""What the names of the package's threads begin with."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the processes do."""

    workers: int = 1
    pushes: int = 1
    stage: str = "device"
    sha256: bool = False
    bucket_bytes: int = 2048
    timeout: float = 20.0
    tensors: str = "many"
    """A function of this module, by name."""
    fault: str = ""
    """A name in `Trainer.write` or `load`."""
    at: int = 3
    """Number of the tensor, or of the bucket in a worker, at which the fault happens."""
    keep: bool = False
    """Whether the engine keeps what it is given."""
    culprit: int = 0
    """Rank of the worker that has the fault."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a process has done."""

    error: str | None
    """Class and message; None for success."""
    seconds: float
    """From the first tensor on, or from the beginning where there was none."""
    threads: list[str]
    """Of the package, that are left."""
    files: int
    """That are left open."""
    pushes: list[dict[str, tuple[str, tuple[int, ...], str]]]
    """What a worker was given, by name: dtype, shape and SHA-256."""
    reports: list[list[dict[str, Any]]]
    """What the trainer heard."""
    most_live: int
    """Buffers that were alive at once: of the trainer, or of the worker beside those that it kept."""


def many() -> dict[str, Tensor]:
    """Every dtype in odd sizes, without axes, empty, and larger than a bucket."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for shape in ((), (0,), (3, 0, 5), (1,), (7,), (3, 5), (129, 3)):
        for name, dtype in DTYPES.items():
            if dtype.is_complex and not shape:
                continue
            top = 2 if dtype == torch.bool else 256
            nbytes = torch.Size(shape).numel() * dtype.itemsize
            data = torch.randint(top, (nbytes,), generator=generator, dtype=torch.uint8)
            if name != "F4" or shape:
                found[f"{name}{list(shape)}"] = data.view(dtype).view(shape)
    found["larger than a bucket"] = torch.randint(256, (5001,), generator=generator, dtype=torch.uint8)
    return found


def odd_names() -> dict[str, Tensor]:
    """Names that a list of lines would take apart."""
    return {name: torch.arange(3) for name in ("a b", "two\nlines", "\u2028", "ä", "")}


def even() -> dict[str, Tensor]:
    """Twelve tensors, each of which fills a bucket of 2048 bytes."""
    return {f"t{i}": torch.full((512,), float(i)) for i in range(12)}


def nothing() -> dict[str, Tensor]:
    """No tensor at all."""
    return {}


def facts(tensor: Tensor) -> tuple[str, tuple[int, ...], str]:
    """What must be equal on both sides."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(data).hexdigest()


def expected(plan: Plan) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """What every worker must get."""
    return {name: facts(tensor) for name, tensor in globals()[plan.tensors]().items()}


def run(plan: Plan, *, limit: float = 40.0) -> dict[str, Outcome | None]:
    """Run a plan.

    Returns:
        What each process says, "trainer" and "worker 0" and so on; None for one that was killed or stopped.

    Raises:
        AssertionError: when one hangs for `limit` seconds.
    """
    processes: dict[str, Any] = {}
    pipes: dict[str, Pipe] = {}

    def start(name: str, target: Any, *args: Any) -> None:
        pipes[name], theirs = CONTEXT.Pipe()
        processes[name] = CONTEXT.Process(target=target, args=(theirs, plan, *args), daemon=True)
        processes[name].start()
        theirs.close()

    try:
        start("trainer", trainer)
        assert pipes["trainer"].poll(limit)
        invitation = pipes["trainer"].recv()
        for rank in range(plan.workers):
            start(f"worker {rank}", worker, invitation, rank)
        return _outcomes(processes, pipes, time.monotonic() + limit)
    finally:
        for process in processes.values():
            process.kill()
        for process in processes.values():
            process.join()


def _outcomes(processes: dict[str, Any], pipes: dict[str, Pipe], end: float) -> dict[str, Outcome | None]:
    found: dict[str, Outcome | None] = {}
    ended: set[str] = set()
    while len(found) < len(pipes):
        waiting = {pipe: name for name, pipe in pipes.items() if name not in found}
        ready = wait(list(waiting), timeout=0.2)
        for pipe in ready:
            try:
                said = pipe.recv()
            except EOFError:
                said = None
            ended.add(waiting[pipe])
            if said != "ended":
                found[waiting[pipe]] = said
        for name in pipes.keys() - ended:
            if _stopped(processes[name].pid) and len(ended) == len(pipes) - 1:
                processes[name].kill()  # the others have given it up, and let go of what they shared when it ends
        assert time.monotonic() < end, f"these hang: {sorted(pipes.keys() - found.keys())}"
    return found


def _stopped(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


class Record:
    """What a process notes of itself."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        open_store("127.0.0.1", 5.0)  # libuv keeps a pipe from the first store of a process on
        self.files = open_files()
        self.start = time.monotonic()
        self.error: str | None = None
        self.pushes: list[Any] = []
        self.reports: list[Any] = []
        self.most_live = 0
        self.kept: list[Tensor] = []

    def count(self, made: list[StorageWeakRef], buffer: Tensor) -> None:
        """Note how many buffers are alive at once, beside those that the engine keeps."""
        made.append(StorageWeakRef(buffer.untyped_storage()))

        def live() -> int:
            kept = {tensor.untyped_storage().data_ptr() for tensor in self.kept}
            return sum(not one.expired() for one in made) - len(kept)

        end = time.monotonic() + 0.2
        while live() > 2 and time.monotonic() < end:  # gloo's thread lets go of a tensor shortly after it has come
            time.sleep(0.005)
        self.most_live = max(self.most_live, live())

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"

    def send(self, pipe: Pipe) -> None:
        seconds = time.monotonic() - self.start
        pipe.send("ended")
        end = time.monotonic() + 6
        while True:
            gc.collect()
            threads = [thread.name for thread in threading.enumerate() if thread.name.startswith(ATTENDED)]
            left = open_files() - self.files
            if (not threads and left <= 0) or time.monotonic() > end:
                break
            time.sleep(0.02)
        pipe.send(
            Outcome(
                error=self.error,
                seconds=seconds,
                threads=threads,
                files=left,
                pushes=self.pushes,
                reports=self.reports,
                most_live=self.most_live,
            )
        )


def open_files() -> int:
    """Files and sockets that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def die(how: str) -> None:
    """End or stop this process, as the kernel would, or as a debugger would."""
    if "killed" in how:
        os.kill(os.getpid(), signal.SIGKILL)
    if "stopped" in how:
        os.kill(os.getpid(), signal.SIGSTOP)


def trainer(pipe: Pipe, plan: Plan) -> None:
    """The process of the trainer."""
    record = Record()
    with record.noted():
        _train(pipe, plan, record)
    record.send(pipe)


def _train(pipe: Pipe, plan: Plan, record: Record) -> None:
    count_sent(record)
    tensors = globals()[plan.tensors]()
    connection = Connection(workers=plan.workers, listen="127.0.0.1", device=CPU, timeout=plan.timeout)
    push = None
    try:
        pipe.send(connection.invitation)
        if plan.fault == "trainer refuses":
            raise_on_channel(connection)
        connection.meet(lambda: None)
        infos = {name: info_of(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        manifest = Manifest(version=1, tensors=infos, bucket_bytes=plan.bucket_bytes, sha256=plan.sha256)
        for _ in range(plan.pushes):
            record.start = time.monotonic()
            push = Push(connection, manifest, lambda: None)
            for at, (name, tensor) in enumerate(tensors.items()):
                _write(push, name, tensor, plan if at == plan.at else dataclasses.replace(plan, fault=""))
            push.finish()
            record.reports.append(push.reports(plan.timeout, lambda: None))
    except BaseException as error:
        if push is not None:
            push.stop(error)
        raise
    finally:
        connection.close()


def raise_on_channel(connection: Connection) -> None:
    """Let the trainer ask for a channel that cannot be."""
    connection._requested = "nccl"


def _write(push: Push, name: str, tensor: Tensor, plan: Plan) -> None:
    die(plan.fault if plan.fault.startswith("trainer") else "")
    if plan.fault == "trainer raises":
        raise ZeroDivisionError("the model is gone")
    if plan.fault == "bit flips":
        _flip_the_next_bucket(push)
    if plan.fault == "digest differs":
        push._sha256["t0"] = "0" * 64
    if plan.fault == "digest is missing":
        del push._sha256["t0"]
    push.write(name, tensor)


def _flip_the_next_bucket(push: Push) -> None:
    send = push._channel.send

    def flipped(nbytes: int) -> None:
        push._channel.send = send  # type: ignore[method-assign]
        push._connection._slots[push._at % 2][5] ^= 1
        send(nbytes)

    push._channel.send = flipped  # type: ignore[method-assign]


def worker(pipe: Pipe, plan: Plan, invitation: Invitation, rank: int) -> None:
    """The process of a worker."""
    record = Record()
    with record.noted():
        _work(plan, invitation, rank, record)
    record.send(pipe)


def count_received(record: Record) -> None:
    """Count the buffers that this worker receives into."""
    made: list[StorageWeakRef] = []
    room = channels._room

    def counted(nbytes: int, device: torch.device) -> Tensor:
        buffer = room(nbytes, device)
        record.count(made, buffer)
        return buffer

    channels._room = counted


def count_sent(record: Record) -> None:
    """Count the buffers that this trainer fills."""
    made: list[StorageWeakRef] = []
    zeros = torch.zeros

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        buffer = zeros(*args, **kwargs)
        if buffer.dtype == torch.uint8 and buffer.numel() > 1:
            record.count(made, buffer)
        return buffer

    torch.zeros = counted


def _raise(*args: Any) -> None:
    raise TransferError("bytes have changed")


def _work(plan: Plan, invitation: Invitation, rank: int, record: Record) -> None:
    if plan.stage == "device":  # the other one keeps everything
        count_received(record)
    fault = plan.fault if rank == plan.culprit else ""
    if fault == "worker killed before it came":
        die(fault)
    if fault == "worker got other bytes":
        _Proofs.compare = _raise  # type: ignore[method-assign]
    receiver = Receiver(invitation, rank=rank, device=CPU, about={"engine": "test"})
    try:
        receiver.meet()
        for push in range(1, plan.pushes + 1):
            got: dict[str, Any] = {}
            record.pushes.append(got)
            buckets = iter(range(10_000))
            record.start = time.monotonic()

            def load(tensors: list[tuple[str, Tensor]], got: Any = got, buckets: Any = buckets) -> None:
                if next(buckets) == plan.at and fault.startswith("worker"):
                    die(fault)
                    if fault == "worker raises":
                        raise ZeroDivisionError("the engine is full")
                if plan.keep:
                    record.kept += [tensor for _, tensor in tensors]
                got |= {name: facts(tensor) for name, tensor in tensors}

            def finish(manifest: Manifest) -> dict[str, Any]:
                if fault == "finish raises":
                    raise ZeroDivisionError("the engine is full")
                return {"version": manifest.version}

            receiver.receive(push, load, finish, stage=plan.stage)
    finally:
        receiver.close()
