"""How buckets reach the ranks of a server of SGLang: a broadcast in a process group, or a pickle in the request."""

from __future__ import annotations

import datetime
import threading
from concurrent.futures import Future
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.errors import TransferError, summary
from megatron_fp32.streaming.control import Call
from megatron_fp32.streaming.sglang_buckets import FlatBucket, pickled
from megatron_fp32.streaming.sglang_control import SGLangControl
from megatron_fp32.transfer.channels import Group, Kind, drop
from megatron_fp32.transfer.rendezvous import new_secret, open_store, settle, wait_until

Backend = Literal["nccl", "gloo"]

STORE_PREFIX = {"gloo": "cpu", "nccl": "cuda"}
"""What torch's `_new_process_group_helper` puts in front of a backend's keys: the first device that it serves."""


class Flight:
    """A bucket on its way.

    Args:
        call: the request that lets the server receive and load it.
        work: the broadcast; None where the request carries the bucket.
        buffer: is kept alive on the way.
        timeout: seconds.
    """

    def __init__(self, call: Call, work: Any, buffer: Tensor, timeout: float) -> None:
        self._call, self._work, self._buffer, self._timeout = call, work, buffer, timeout

    @property
    def arrived(self) -> bool:
        """Whether no rank of the server waits for bytes."""
        return self._work is None or bool(self._work.is_completed())

    def wait(self) -> None:
        """Wait until every rank has loaded the bucket.

        Raises:
            TransferError: with what the server says.
        """
        if self._work is not None:
            wait_until(self._work.is_completed, "the server to receive a bucket", self._timeout, self._call.check)
            try:
                self._work.wait()
            except RuntimeError as error:
                self._call.join(self._timeout)  # the server knows more than a broken connection tells
                raise TransferError(f"a broadcast of weights failed: {summary(error)}") from error
        self._call.join(self._timeout)


class Transport(Protocol):
    """Buffers, and how they leave."""

    kind: Kind

    def buffer(self, nbytes: int) -> Tensor:
        """A buffer to fill, uint8 [nbytes]. Of two buffers, the older one must have been loaded."""

    def send(self, bucket: FlatBucket, buffer: Tensor) -> Flight:
        """Send a buffer that is full."""

    def release(self) -> None:
        """Free the buffers, after a push that has succeeded."""

    def close(self) -> None:
        """End the connection."""


class Broadcasts:
    """Sends in a process group of the trainer (rank 0) and the server's ranks.

    SGLang makes the group with torch's own helper, from the keys of a store at the trainer. This side makes its member
    by itself, so that it needs no default group, leaves nothing registered, and listens on one address. NCCL opens
    sockets of its own: `NCCL_SOCKET_IFNAME` says where.

    Args:
        control: of the server.
        listen: address of this machine.
        backend: "gloo" or "nccl".
        device: of the tensors.
        timeout: seconds.

    Raises:
        TransferError: when the ranks do not come.
        ValueError: when `listen` is not an address of this machine.
    """

    def __init__(
        self, control: SGLangControl, *, listen: str, backend: Backend, device: torch.device, timeout: float
    ) -> None:
        self.kind: Kind = backend
        self._control, self._device, self._timeout = control, device, timeout
        size = control.workers() + 1
        self._store, port = open_store(listen, timeout)
        self._name = f"megatron_fp32_{new_secret()}"
        call = Call(lambda: control.join(self._name, backend, listen, port, size))
        answer: Future[Group] = Future()
        make = threading.Thread(
            target=settle, args=(lambda: self._member(size, listen), answer), name="megatron_fp32 group", daemon=True
        )
        make.start()
        wait_until(answer.done, f"the ranks of {control.url}", timeout, call.check)
        try:
            self._group = answer.result()
        except RuntimeError as error:
            call.check()
            raise TransferError(f"{control.url} could not connect over {backend}: {summary(error)}") from error
        try:
            call.join(timeout)
        except BaseException:
            self._group.close()
            raise
        self._slots: list[Tensor] = []
        self._sent = 0
        self._last: Flight | None = None

    def _member(self, size: int, listen: str) -> Group:
        store = dist.PrefixStore(self._name, self._store)
        for prefix in (self._name, STORE_PREFIX[self.kind]):
            store = dist.PrefixStore(f"{prefix}/", store)
        if self.kind == "gloo":
            options = dist.ProcessGroupGloo._Options()
            options._timeout = datetime.timedelta(seconds=self._timeout)
            options._threads = 2
            options._devices = [dist.ProcessGroupGloo.create_device(hostname=listen)]
            return Group("gloo", cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, 0, size, options)))
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = datetime.timedelta(days=7)  # NCCL ends the process after its own; `wait_until` keeps ours
        return Group("nccl", cast(dist.ProcessGroup, dist.ProcessGroupNCCL(store, 0, size, nccl)))

    def buffer(self, nbytes: int) -> Tensor:
        """See `Transport`."""
        if len(self._slots) == 2:
            self._slots.append(self._slots.pop(0))
            if self._slots[-1].numel() < nbytes:
                self._slots.pop()  # before the new one is made
        if len(self._slots) < 2:
            self._slots.append(torch.empty(nbytes, dtype=torch.uint8, device=self._device))
        return self._slots[-1][:nbytes]

    def send(self, bucket: FlatBucket, buffer: Tensor) -> Flight:
        """See `Transport`. The buffer is full before the server hears of it: no rank waits inside of a broadcast."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # the broadcast leaves from another thread
        self._sent, self._last = self._sent + 1, None
        call = Call(lambda: self._control.receive(bucket, self._name))
        answer: Future[Any] = Future()
        # NCCL connects at the first broadcast, and waits for ranks that may never come.
        start = threading.Thread(
            target=settle,
            args=(lambda: self._group.broadcast(buffer), answer),
            name="megatron_fp32 broadcast",
            daemon=True,
        )
        start.start()
        wait_until(answer.done, f"the ranks of {self._control.url}", self._timeout, call.check)
        self._last = Flight(call, answer.result(), buffer, self._timeout)
        return self._last

    def _idle(self) -> bool:
        """Whether no rank of the server waits for bytes."""
        return self._sent == 0 or (self._last is not None and self._last.arrived)

    def release(self) -> None:
        """See `Transport`. Everything has arrived."""
        self._slots, self._sent, self._last = [], 0, None

    def close(self) -> None:
        """See `Transport`.

        A rank that waits for bytes does not hear a request. Its broadcast fails when this member is gone.
        """
        try:
            if self._idle():
                self._control.leave(self._name)
        finally:
            self._group.close()
            held, self._store = [self._store], None
            drop(held)


class Handles:
    """Sends pickles to a server on this machine; see `pickled` for what they hold.

    Nothing is copied to the server, which maps the trainer's memory.
    """

    kind: Kind = "ipc"

    def __init__(self, control: SGLangControl, *, device: torch.device, timeout: float) -> None:
        self._control, self._device, self._timeout = control, device, timeout
        self._workers = control.workers()

    def buffer(self, nbytes: int) -> Tensor:
        """See `Transport`. Always a new one: the server may read the old one still, and torch frees it afterwards."""
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def send(self, bucket: FlatBucket, buffer: Tensor) -> Flight:
        """See `Transport`."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        # torch counts the readers of a handle, so that every rank needs its own.
        pickles = [pickled(bucket, buffer) for _ in range(self._workers)]
        return Flight(Call(lambda: self._control.load(pickles)), None, buffer, self._timeout)

    def release(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""
