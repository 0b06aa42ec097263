"""How the bytes of a bucket cross: a broadcast over gloo or NCCL, or CUDA memory that both processes map (IPC).

The sender has two buffers ("slots"): one is filled while the other one crosses. A receiver gets buffers of its own, so
that an engine may keep what it was given.
"""

from __future__ import annotations

import base64
import collections
import datetime
from collections.abc import Callable
from typing import Any, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.errors import TransferError
from megatron_fp32.transfer.rendezvous import Messages, wait_until

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


def make_group(
    kind: Kind, messages: Messages, name: str, rank: int, size: int, *, address: str, timeout: float
) -> dist.ProcessGroup:
    """A process group of the trainer (rank 0) and the workers, beside torch's default group.

    Args:
        kind: "gloo" or "nccl".
        messages: where the members meet.
        name: of the group; a new one after every failure.
        rank: 0 for the trainer.
        size: workers and the trainer.
        address: of this process, on which gloo listens.
        timeout: seconds. NCCL gets more, because NCCL ends the process when its own time-out is over; `wait_until`
            keeps this one.
    """
    store = dist.PrefixStore(f"group/{name}", messages.store)
    if kind == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._timeout = datetime.timedelta(seconds=timeout)
        options._threads = 2
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
        return cast(dist.ProcessGroup, dist.ProcessGroupGloo(store, rank, size, options))
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(days=7)
    return cast(dist.ProcessGroup, dist.ProcessGroupNCCL(store, rank, size, options))


def broadcast(group: dist.ProcessGroup, buffer: Tensor) -> Any:
    """Start to send a buffer from the trainer to all workers."""
    options = dist.BroadcastOptions()
    options.rootRank = options.rootTensor = 0
    options.asyncOp = True
    return group.broadcast([buffer], options)


class _Work:
    """A broadcast on its way, with what it needs alive."""

    def __init__(self, work: Any, timeout: float, check: Check) -> None:
        self._work, self._timeout, self._check = work, timeout, check

    def wait(self) -> None:
        wait_until(self._work.is_completed, "the other side of a broadcast", self._timeout, self._check)
        try:
            self._work.wait()
        except RuntimeError as error:
            raise TransferError(f"a broadcast of weights failed: {error}") from error


class GroupSender:
    """Sends over a process group; see `SendChannel`."""

    def __init__(self, group: dist.ProcessGroup, slots: list[Tensor], *, timeout: float, check: Check) -> None:
        self._group, self._slots, self._timeout, self._check = group, slots, timeout, check
        self._works: list[_Work | None] = [None, None]
        self._at = 0

    def slot(self) -> Tensor:
        """See `SendChannel`."""
        self._wait(self._at)
        return self._slots[self._at]

    def send(self, nbytes: int) -> None:
        """See `SendChannel`."""
        work = broadcast(self._group, self._slots[self._at][:nbytes])
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

    def __init__(self, group: dist.ProcessGroup, device: torch.device, *, timeout: float, check: Check) -> None:
        self._group, self._device, self._timeout, self._check = group, device, timeout, check
        self._posted: collections.deque[tuple[Tensor, _Work]] = collections.deque()

    def post(self, nbytes: int) -> None:
        """See `ReceiveChannel`."""
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._posted.append((buffer, _Work(broadcast(self._group, buffer), self._timeout, self._check)))

    def take(self) -> Tensor:
        """See `ReceiveChannel`."""
        buffer, work = self._posted.popleft()
        work.wait()
        return buffer


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
        buffer = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
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
