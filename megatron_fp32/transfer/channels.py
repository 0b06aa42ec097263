"""How the bytes of a bucket cross: a broadcast over gloo or NCCL, or CUDA memory that both processes map (IPC).

The sender has two buffers ("slots"): one is filled while the other one crosses. A receiver gets buffers of its own, so
that an engine may keep what it was given.
"""

from __future__ import annotations

import base64
import collections
import datetime
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.errors import TransferError, summary
from megatron_fp32.transfer.rendezvous import Messages, settle, wait_until

Kind = Literal["gloo", "nccl", "ipc"]
KINDS: tuple[Kind, ...] = ("gloo", "nccl", "ipc")

Check = Callable[[], None]
"""Is called while a side waits, and raises when the other side has failed."""


class SendChannel(Protocol):
    """The trainer's end. Buckets leave in the order of the calls."""

    def slot(self) -> Tensor:
        """A buffer to fill, uint8 [slot_bytes]; waits until the bucket that was in it has crossed."""

    def send(self, nbytes: int) -> None:
        """Send the first bytes of the buffer that `slot` has given."""

    def flush(self) -> None:
        """Wait until everything has crossed."""


class ReceiveChannel(Protocol):
    """The end of one worker."""

    def post(self, nbytes: int) -> None:
        """Make room for the next bucket, which may begin to arrive."""

    def take(self) -> Tensor:
        """The oldest bucket that was posted, uint8 [nbytes], in memory of the caller's own."""


class Group:
    """A process group of the trainer (rank 0) and the workers, beside torch's default group; see `open_group`."""

    def __init__(self, kind: Kind, group: dist.ProcessGroup) -> None:
        self._kind = kind
        self._group: dist.ProcessGroup | None = group

    def broadcast(self, buffer: Tensor) -> Any:
        """Start to send a buffer from the trainer to all workers.

        Raises:
            TransferError: when the group is closed, or has failed.
        """
        if self._group is None:
            raise TransferError("the connection between the trainer and the engine is closed")
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.asyncOp = True
        try:
            return self._group.broadcast([buffer], options)
        except RuntimeError as error:
            raise TransferError(f"a broadcast of weights failed: {summary(error)}") from error

    def close(self) -> None:
        """Let go of the group without waiting for what is in flight."""
        held, self._group = [self._group], None
        if self._kind == "nccl" and held[0] is not None:
            held[0].abort()
        drop(held)


def drop(things: list[Any]) -> None:
    """Forget the last references to things in a thread: the destructor of gloo's group waits for what is in flight."""
    threading.Thread(target=things.clear, name="megatron_fp32 close", daemon=True).start()


def open_group(
    kind: Kind,
    messages: Messages,
    rank: int,
    workers: int,
    device: torch.device,
    *,
    address: str,
    timeout: float,
    check: Check,
) -> Group:
    """Open a process group together with all of its members, and send a first byte over it.

    Args:
        kind: "gloo" or "nccl".
        messages: where the members meet.
        rank: 0 for the trainer.
        workers: of the engine.
        device: of the tensors that will be sent.
        address: of this process, on which gloo listens.
        timeout: seconds. NCCL gets more, because NCCL ends the process when its own time-out is over; `wait_until`
            keeps this one.
        check: is called while this waits.

    Raises:
        TransferError: when the others do not come.
    """
    answer: Future[Group] = Future()

    def make() -> Group:
        group = Group(kind, _make_group(kind, messages, rank, workers + 1, address=address, timeout=timeout))
        work = group.broadcast(torch.zeros(1, dtype=torch.uint8, device=device))
        wait_until(work.is_completed, "the first broadcast", timeout, check)
        work.wait()
        return group

    # gloo's and NCCL's first steps wait for the others, and cannot be interrupted.
    threading.Thread(target=settle, args=(make, answer), name="megatron_fp32 group", daemon=True).start()
    wait_until(answer.done, f"all members of the {kind} group", timeout, check)
    try:
        return answer.result()
    except TransferError:
        raise
    except RuntimeError as error:
        raise TransferError(f"the trainer and the engine could not connect over {kind}: {summary(error)}") from error


def _make_group(
    kind: Kind, messages: Messages, rank: int, size: int, *, address: str, timeout: float
) -> dist.ProcessGroup:
    store = dist.PrefixStore("group", messages.store)
    if kind == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._timeout = datetime.timedelta(seconds=timeout)
        options._threads = 2
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        return cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, size, options))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(days=7)
    return cast(dist.ProcessGroup, dist.ProcessGroupNCCL(store, rank, size, options))


class _Work:
    """A broadcast on its way, with what it needs alive."""

    def __init__(self, work: Any, timeout: float, check: Check) -> None:
        self._work, self._timeout, self._check = work, timeout, check

    def wait(self) -> None:
        wait_until(self._work.is_completed, "the other side of a broadcast", self._timeout, self._check)
        try:
            self._work.wait()
        except RuntimeError as error:
            self._check()  # whoever fails says why before leaving the group
            raise TransferError(f"a broadcast of weights failed: {summary(error)}") from error


class GroupSender:
    """Sends over a process group; see `SendChannel`."""

    def __init__(self, group: Group, slots: list[Tensor], *, timeout: float, check: Check) -> None:
        self._group, self._slots, self._timeout, self._check = group, slots, timeout, check
        self._works: list[_Work | None] = [None, None]
        self._at = 0

    def slot(self) -> Tensor:
        """See `SendChannel`."""
        self._wait(self._at)
        return self._slots[self._at]

    def send(self, nbytes: int) -> None:
        """See `SendChannel`."""
        work = self._group.broadcast(self._slots[self._at][:nbytes])
        self._works[self._at] = _Work(work, self._timeout, self._check)
        self._at = 1 - self._at

    def flush(self) -> None:
        """See `SendChannel`."""
        self._wait(self._at)
        self._wait(1 - self._at)

    def _wait(self, at: int) -> None:
        work, self._works[at] = self._works[at], None
        if work is not None:
            work.wait()


class GroupReceiver:
    """Receives over a process group; see `ReceiveChannel`."""

    def __init__(self, group: Group, device: torch.device, *, timeout: float, check: Check) -> None:
        self._group, self._device, self._timeout, self._check = group, device, timeout, check
        self._posted: collections.deque[tuple[Tensor, _Work]] = collections.deque()

    def post(self, nbytes: int) -> None:
        """See `ReceiveChannel`."""
        buffer = _room(nbytes, self._device)
        self._posted.append((buffer, _Work(self._group.broadcast(buffer), self._timeout, self._check)))

    def take(self) -> Tensor:
        """See `ReceiveChannel`."""
        buffer, work = self._posted.popleft()
        work.wait()
        return buffer


def _room(nbytes: int, device: torch.device) -> Tensor:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        raise TransferError(
            f"there is no memory for a bucket of {nbytes} bytes on {device}: {summary(error)}"
        ) from error


class IpcSender:
    """Lets workers on the same machine read this process's CUDA memory; see `SendChannel`."""

    def __init__(
        self, messages: Messages, name: str, slots: list[Tensor], workers: int, *, timeout: float, check: Check
    ) -> None:
        self._messages, self._name, self._slots, self._workers = messages, name, slots, workers
        self._timeout, self._check = timeout, check
        self._sent = 0

    def slot(self) -> Tensor:
        """See `SendChannel`."""
        self._taken(self._sent - 2)
        return self._slots[self._sent % 2]

    def send(self, nbytes: int) -> None:
        """See `SendChannel`."""
        torch.cuda.current_stream(self._slots[0].device).synchronize()
        self._messages.count(f"{self._name}/ready", 1)
        self._sent += 1

    def flush(self) -> None:
        """See `SendChannel`."""
        self._taken(self._sent - 1)

    def _taken(self, bucket: int) -> None:
        expected = (bucket + 1) * self._workers
        wait_until(
            lambda: self._messages.count(f"{self._name}/taken") >= expected,
            f"workers to copy bucket {bucket}",
            self._timeout,
            self._check,
        )


class IpcReceiver:
    """Copies from the trainer's CUDA memory; see `ReceiveChannel`."""

    def __init__(
        self,
        messages: Messages,
        name: str,
        slots: list[Tensor],
        device: torch.device,
        *,
        timeout: float,
        check: Check,
    ) -> None:
        self._slots = slots
        self._messages, self._name, self._device = messages, name, device
        self._timeout, self._check = timeout, check
        self._posted: collections.deque[int] = collections.deque()
        self._taken = 0

    def post(self, nbytes: int) -> None:
        """See `ReceiveChannel`. The memory is taken when the bucket is."""
        self._posted.append(nbytes)

    def take(self) -> Tensor:
        """See `ReceiveChannel`."""
        nbytes, slot = self._posted.popleft(), self._slots[self._taken % 2]
        wait_until(
            lambda: self._messages.count(f"{self._name}/ready") > self._taken,
            f"bucket {self._taken}",
            self._timeout,
            self._check,
        )
        if nbytes > slot.numel():
            raise TransferError(f"a bucket of {nbytes} bytes was announced, and the trainer shares {slot.numel()}")
        buffer = _room(nbytes, self._device)
        buffer.copy_(slot[:nbytes])
        torch.cuda.current_stream(self._device).synchronize()
        self._taken += 1
        self._messages.count(f"{self._name}/taken", 1)
        return buffer


def share(messages: Messages, name: str, slots: list[Tensor]) -> None:
    """Let other processes of this machine map CUDA buffers. The handles are torch's own; nothing is pickled."""
    uuid = str(torch.cuda.get_device_properties(slots[0].device).uuid)
    messages.put(name, {"device": uuid, "handles": [_handle(slot) for slot in slots]})


def open_shared(messages: Messages, name: str, *, timeout: float, check: Check) -> list[Tensor]:
    """The buffers of `share`, in another process.

    Raises:
        TransferError: when this process does not see the GPU.
    """
    shared = messages.get(name, timeout, check)
    source = device_with_uuid(shared["device"])
    return [_open(handle, source) for handle in shared["handles"]]


def _handle(slot: Tensor) -> list[Any]:
    """What another process needs to map a CUDA buffer: torch's own tuple, with bytes as text."""
    parts = slot.untyped_storage()._share_cuda_()
    return [{"bytes": base64.b64encode(part).decode()} if isinstance(part, bytes) else part for part in parts]


def _open(handle: list[Any], device: int) -> Tensor:
    _, *parts = [base64.b64decode(part["bytes"]) if isinstance(part, dict) else part for part in handle]
    storage = torch.UntypedStorage._new_shared_cuda(device, *parts)
    return torch.empty(0, dtype=torch.uint8, device=f"cuda:{device}").set_(storage)


def device_with_uuid(uuid: str) -> int:
    """Index of a GPU among those that this process sees.

    Raises:
        TransferError: when this process does not see it.
    """
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == uuid:
            return index
    raise TransferError(f"this process does not see the trainer's GPU {uuid}; check CUDA_VISIBLE_DEVICES")
