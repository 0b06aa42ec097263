"""The trainer's end: a connection to the workers of one engine, and a push over it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.errors import TransferError, summary
from megatron_fp32.transfer.buckets import Bucket, plan_buckets
from megatron_fp32.transfer.channels import (
    KINDS,
    Group,
    GroupSender,
    IpcSender,
    Kind,
    SendChannel,
    drop,
    open_group,
    share,
)
from megatron_fp32.transfer.checksum import write_checksum
from megatron_fp32.transfer.manifest import Manifest
from megatron_fp32.transfer.rendezvous import LONG, Invitation, Messages, new_secret, open_store

HEARTBEAT_SECONDS = 1.0
SMALL = 1 << 20
"""Bytes below which the tensors of a bucket are copied together: a call for each would take longer than its copy."""


class Connection:
    """The trainer's connection to all workers of one engine.

    Args:
        workers: of the engine, over all of its ranks.
        listen: address of this machine on which the engine reaches the trainer.
        device: of the trainer's tensors.
        channel: how bytes cross; "auto" chooses from what the workers say of themselves.
        timeout: seconds that this side waits for a worker.
    """

    def __init__(
        self, *, workers: int, listen: str, device: torch.device, channel: Kind | str = "auto", timeout: float
    ) -> None:
        self.workers, self.device, self.timeout = workers, device, timeout
        self._listen, self._requested = listen, channel
        self._store, port = open_store(listen, timeout)
        secret = new_secret()
        self.messages = Messages(self._store, secret, timeout=timeout)
        self.invitation = Invitation(address=listen, port=port, secret=secret, world_size=workers, timeout=timeout)
        self.hellos: list[Mapping[str, Any]] = []
        self.kind: Kind | None = None
        self.group: Group | None = None
        self.pushes = 0
        self._slots: list[Tensor] = []
        self._generation = 0
        self._planned: tuple[int, int] | None = None
        self._planned_tensors: Mapping[str, Any] = {}
        self._targets: dict[tuple[int, int], list[Tensor]] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._beat, name="megatron_fp32 heartbeat", daemon=True).start()

    def meet(self, check: Callable[[], None]) -> None:
        """Wait for the workers, and open the channel together with them.

        Args:
            check: raises when the engine has refused the invitation.

        Raises:
            TransferError: when a worker does not come, or no channel reaches all of them.
        """
        try:
            self._meet(check)
        except BaseException as error:
            with contextlib.suppress(Exception):  # this error is the one to raise
                self.messages.put("refused", summary(error, LONG))
            raise

    def _meet(self, engine_check: Callable[[], None]) -> None:
        def check() -> None:
            engine_check()
            self.messages.raise_if("refused", "the engine did not connect")

        self.hellos = [self.messages.get(f"hello/{rank}", self.timeout, check) for rank in range(self.workers)]
        kind = choose_channel(self._requested, describe_device(self.device), self.hellos)
        self.messages.put("channel", kind)
        if kind != "ipc":
            self.group = open_group(
                kind,
                self.messages,
                0,
                self.workers,
                self.device,
                address=self._listen,
                timeout=self.timeout,
                check=check,
            )
        self.kind = kind

    def slots(self, nbytes: int) -> tuple[list[Tensor], int]:
        """Two buffers of at least this size, and how often they were allocated: workers map them once."""
        if not self._slots or self._slots[0].numel() < nbytes:
            self._slots, self._targets, self._planned = [], {}, None  # before there are others
            # Zeros, because the bytes between two tensors belong to the checksum.
            self._slots = [torch.zeros(nbytes, dtype=torch.uint8, device=self.device) for _ in range(2)]
            self._generation += 1
            if self.kind == "ipc":
                share(self.messages, f"slots/{self._generation}", self._slots)
        return self._slots, self._generation

    def targets(self, manifest: Manifest, at: int, bucket: Bucket, slot: Tensor) -> list[Tensor]:
        """Where the tensors of a bucket go in a slot. They are the same at every push of the same tensors.

        Args:
            manifest: of the push.
            at: which of its buckets.
            bucket: that bucket.
            slot: one of `slots`.
        """
        plan = (self._generation, manifest.bucket_bytes)
        if self._planned != plan or (at == 0 and self._planned_tensors != manifest.tensors):
            self._planned, self._planned_tensors, self._targets = plan, manifest.tensors, {}
        key = (at, slot.data_ptr())
        if key not in self._targets:
            self._targets[key] = [place.view(slot) for place in bucket.places]
        return self._targets[key]

    def stop_sending(self) -> None:
        """Let go of the group and the buffers. The heart still beats."""
        group, self.group, self._slots, self._targets = self.group, None, [], {}
        if group is not None:
            group.close()

    def close(self) -> None:
        """Let go of the group and the store. Workers that still wait get an error."""
        if self._closed.is_set():
            return
        self._closed.set()
        self.stop_sending()
        things = [self.messages, self._store]
        del self.messages, self._store
        drop(things)

    def _beat(self) -> None:
        """Tell the engine that the trainer lives; see the lease in the engine's plugin."""
        messages = self.messages
        while not self._closed.wait(HEARTBEAT_SECONDS):
            # A process that was stopped for a while and goes on finds its time over.
            with contextlib.suppress(TransferError):
                messages.count("beat", 1)


class Push:
    """One push over a connection: `write` every tensor of the manifest in its order, then `finish`.

    Args:
        connection: which has met its workers.
        manifest: of the push.
        check: is called while this side waits; raises when the engine has failed.
    """

    def __init__(self, connection: Connection, manifest: Manifest, check: Callable[[], None]) -> None:
        self._connection, self._manifest = connection, manifest
        connection.pushes += 1
        self.name = f"push/{connection.pushes}"
        self.seconds = 0.0
        """Spent here, in copying tensors into buckets and sending those."""
        self.waited = 0.0
        """Of it, waiting for workers."""
        self._messages = connection.messages
        self._engine_check = check
        self._buckets: list[Bucket] = plan_buckets(manifest.tensors, manifest.bucket_bytes)
        self._at, self._place = 0, 0
        self._sha256: dict[str, str] = {}
        self._slot: Tensor | None = None
        self._targets: list[Tensor] = []
        self._small: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._channel = self._open_channel()
        self._messages.put_bytes(f"{self.name}/manifest", manifest.to_bytes())

    def write(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor into its bucket, and send the bucket when it is full.

        Raises:
            TransferError: when the manifest has another tensor at this place, or a worker does not take a bucket.
        """
        start = time.monotonic()
        if self._at == len(self._buckets):
            raise TransferError(f"expected no more tensors, got {name!r}: the manifest ends before it")
        bucket = self._buckets[self._at]
        place = bucket.places[self._place]
        if place.name != name or tensor.dtype != place.info.dtype or tuple(tensor.shape) != place.info.torch_shape:
            raise TransferError(
                f"expected tensor {place.name!r} of {place.info}, got {name!r}: {tensor.dtype} {tuple(tensor.shape)}"
            )
        if self._slot is None:
            with self._waiting():
                self._slot = self._channel.slot()
            self._targets = self._connection.targets(self._manifest, self._at, bucket, self._slot)
        target = self._targets[self._place]
        if tensor.nbytes < SMALL:
            self._small[0].append(target)
            self._small[1].append(tensor.detach())
        else:
            target.copy_(tensor.detach())
        if self._manifest.sha256:
            self._sha256[name] = sha256(tensor)
        self._place += 1
        if self._place == len(bucket.places):
            self._send(bucket, self._slot)
        self.seconds += time.monotonic() - start

    def finish(self) -> None:
        """Wait until every bucket has crossed, and say that this was all.

        Raises:
            TransferError: when tensors are missing.
        """
        start = time.monotonic()
        if self._at != len(self._buckets):
            missing = self._buckets[self._at].places[self._place].name
            raise TransferError(f"expected every tensor of the manifest, got none for {missing!r}")
        with self._waiting():
            self._channel.flush()
        self._messages.put(f"{self.name}/end", self._sha256)
        self.seconds += time.monotonic() - start

    def reports(self, timeout: float, check: Callable[[], None]) -> list[Mapping[str, Any]]:
        """What every worker says of this push, which it has then loaded.

        Args:
            timeout: seconds for each worker.
            check: is called while this waits.

        Raises:
            TransferError: when a worker has failed, or says nothing.
        """

        def both() -> None:
            check()
            self._check()

        names = [f"{self.name}/report/{rank}" for rank in range(self._connection.workers)]
        reports = [self._messages.get(name, timeout, both) for name in names]
        for name in (f"{self.name}/manifest", f"{self.name}/end", *names):
            self._messages.forget(name)
        return reports

    def stop(self, error: BaseException) -> None:
        """Tell the workers that nothing more will come."""
        self._messages.put(f"{self.name}/stop", summary(error, LONG))

    def _send(self, bucket: Bucket, slot: Tensor) -> None:
        if self._small[0]:
            torch._foreach_copy_(*self._small)
            self._small = ([], [])
        payload, trailer = bucket.split(slot)
        write_checksum(payload, trailer)
        self._channel.send(bucket.nbytes)
        self._slot, self._at, self._place = None, self._at + 1, 0

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.waited += time.monotonic() - start

    def _open_channel(self) -> SendChannel:
        connection = self._connection
        largest = max((bucket.nbytes for bucket in self._buckets), default=0)
        slots, generation = connection.slots(largest)
        if connection.kind == "ipc":
            self._messages.put(f"{self.name}/slots", generation)
            return IpcSender(
                self._messages, self.name, slots, connection.workers, timeout=connection.timeout, check=self._check
            )
        if connection.group is None:
            raise TransferError("the connection to the engine is closed, or has not met its workers")
        return GroupSender(connection.group, slots, timeout=connection.timeout, check=self._check)

    def _check(self) -> None:
        self._engine_check()
        self._messages.raise_if(f"{self.name}/failed", "the engine has failed")


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, in row-major order."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy()
    return hashlib.sha256(data.data).hexdigest()


def describe_device(device: torch.device) -> dict[str, Any]:
    """Where a process and its tensors are."""
    uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type
    boot = Path("/proc/sys/kernel/random/boot_id")
    return {
        "machine": boot.read_text().strip() if boot.exists() else socket.gethostname(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": uuid,
    }


def choose_channel(requested: Kind | str, trainer: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]) -> Kind:
    """The channel that reaches all workers.

    NCCL cannot connect two processes on one GPU, and CUDA IPC cannot leave the machine or connect a process with
    itself.

    Args:
        requested: "gloo", "nccl", "ipc" or "auto".
        trainer: what `describe_device` says of the sending rank.
        workers: the same of every worker.

    Raises:
        TransferError: when no channel, or not the requested one, reaches all workers.
        ValueError: for an unknown channel.
    """
    if requested != "auto" and requested not in KINDS:
        raise ValueError(f"channel must be one of {', '.join(KINDS)} and auto, got {requested!r}")
    reasons = _why_not(trainer, workers)
    if requested == "auto":
        for kind in KINDS:
            if reasons[kind] is None:
                return kind
        raise TransferError(f"no channel reaches all workers: {'; '.join(str(reason) for reason in reasons.values())}")
    reason = reasons[requested]  # type: ignore[index]
    if reason is not None:
        raise TransferError(f"channel {requested!r} does not reach all workers: {reason}")
    return requested  # type: ignore[return-value]


def _why_not(trainer: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]) -> dict[Kind, str | None]:
    """Why a channel cannot reach all workers; None for one that can."""
    devices = [trainer["device"], *(worker["device"] for worker in workers)]
    if "cpu" in devices:
        return {
            "gloo": None,
            "nccl": "NCCL needs a GPU in every process",
            "ipc": "CUDA IPC needs a GPU in every process",
        }
    same_gpu = len(set(devices)) < len(devices)
    ipc = None
    if any(worker["machine"] != trainer["machine"] for worker in workers):
        ipc = "CUDA IPC does not leave the machine"
    elif any(worker["pid"] == trainer["pid"] for worker in workers):
        ipc = (
            "CUDA IPC cannot connect a process with itself: let the engine run in a process of its own "
            "(VLLM_ENABLE_V1_MULTIPROCESSING=1)"
        )
    return {
        "gloo": "gloo sends CPU tensors, and every process has a GPU",
        "nccl": "NCCL cannot connect two processes on one GPU" if same_gpu else None,
        "ipc": ipc,
    }
