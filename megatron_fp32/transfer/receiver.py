"""The engine's end: what one worker of any engine does to receive a push and to know that it is whole."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.errors import TransferError
from megatron_fp32.transfer.buckets import Bucket, plan_buckets
from megatron_fp32.transfer.channels import (
    GroupReceiver,
    IpcReceiver,
    Kind,
    ReceiveChannel,
    broadcast,
    make_group,
    open_shared,
)
from megatron_fp32.transfer.checksum import checksums_equal
from megatron_fp32.transfer.manifest import Manifest
from megatron_fp32.transfer.rendezvous import Invitation, Messages, join_store, wait_until
from megatron_fp32.transfer.sender import describe_device, sha256

Stage = Literal["device", "host"]
Load = Callable[[list[tuple[str, Tensor]]], None]
Finish = Callable[[Manifest], dict[str, Any]]


class Receiver:
    """One worker's connection to a trainer.

    Args:
        invitation: from the trainer.
        rank: of this worker among those of its engine.
        device: of this worker's model.
        about: what the trainer should know of the engine; JSON.
    """

    def __init__(self, invitation: Invitation, *, rank: int, device: torch.device, about: dict[str, Any]) -> None:
        if not 0 <= rank < invitation.world_size:
            raise TransferError(f"this worker has rank {rank}, and the trainer expects {invitation.world_size} workers")
        self.invitation, self._rank, self._device, self._about = invitation, rank, device, about
        self.messages = Messages(join_store(invitation), invitation.secret)
        self._group: dist.ProcessGroup | None = None
        self._kind: Kind | None = None
        self._slots: list[Tensor] = []
        self._generation = 0

    def meet(self) -> None:
        """Say hello, and open the channel together with the trainer and the other workers."""
        timeout = self.invitation.timeout
        with self._trainer_lives():
            self.messages.put(f"hello/{self._rank}", self._about | describe_device(self._device))
            kind: Kind = self.messages.get("channel", timeout)
            if kind != "ipc":
                size = self.invitation.world_size + 1
                address = own_address(self.invitation)
                self._group = make_group(
                    kind, self.messages, "0", self._rank + 1, size, address=address, timeout=timeout
                )
                work = broadcast(self._group, torch.zeros(1, dtype=torch.uint8, device=self._device))
                wait_until(work.is_completed, "the first broadcast of the trainer", timeout)
                work.wait()
            self._kind = kind

    def receive(self, push: int, load: Load, finish: Finish, *, stage: Stage) -> None:
        """Receive a push, check it, and load it.

        Args:
            push: number of the push in this connection.
            load: gives tensors to the engine, in the manifest's order. They are the engine's to keep.
            finish: is called when everything has come and no checksum was wrong; what it returns goes into the report.
            stage: "device" loads every bucket as it comes. "host" first keeps all of them in the host's memory, so that
                the engine's model is not touched by a push that fails.

        Raises:
            TransferError: when the push is not whole, with the reason. Other errors are those of `load` and `finish`.
        """
        name = f"push/{push}"
        try:
            with self._trainer_lives():
                report = self._receive(name, load, finish, stage)
                self.messages.put(f"{name}/report/{self._rank}", report)
        except BaseException as error:
            with contextlib.suppress(Exception):  # the trainer may be gone, and this error is the one to raise
                self.messages.put(f"{name}/failed", f"worker {self._rank}: {type(error).__name__}: {error}")
            self.close()
            raise

    def close(self) -> None:
        """Let go of the group."""
        group, self._group, self._slots, self._generation = self._group, None, [], 0
        if group is not None and self._kind == "nccl":
            group.abort()
        if group is not None:
            threading.Thread(target=list.clear, args=([group],), daemon=True).start()

    def _receive(self, name: str, load: Load, finish: Finish, stage: Stage) -> dict[str, Any]:
        check = self._check(name)
        timeout = self.invitation.timeout
        manifest = Manifest.from_bytes(self.messages.get_bytes(f"{name}/manifest", timeout, check))
        buckets = plan_buckets(manifest.tensors, manifest.bucket_bytes)
        seconds = _Seconds()
        proofs = _Proofs(manifest)
        arrivals = self._arrivals(buckets, self._channel(name, check), seconds)
        if stage == "host":
            held = [(bucket, _to_host(buffer)) for bucket, buffer in proofs.checked(arrivals)]
            proofs.compare(self.messages.get_bytes(f"{name}/end", timeout, check))
            arrivals = ((bucket, buffer.to(self._device)) for bucket, buffer in held)
        else:
            arrivals = proofs.checked(arrivals)
        for at, (bucket, buffer) in enumerate(arrivals):
            if at == 0:
                self.messages.count(f"{name}/touched", 1)
            with seconds.of("load"):
                load([(place.name, place.view(buffer)) for place in bucket.places])
            del buffer
        if stage == "device":
            proofs.compare(self.messages.get_bytes(f"{name}/end", timeout, check))
        with seconds.of("load"):
            facts = finish(manifest)
        nbytes = sum(info.nbytes for info in manifest.tensors.values())
        return {"rank": self._rank, "tensors": len(manifest.tensors), "nbytes": nbytes, **seconds.spent, **facts}

    def _arrivals(
        self, buckets: Sequence[Bucket], channel: ReceiveChannel, seconds: _Seconds
    ) -> Iterator[tuple[Bucket, Tensor]]:
        """Every bucket with its bytes; the next one is on its way meanwhile."""
        for at, bucket in enumerate(buckets):
            with seconds.of("receive"):
                if at == 0:
                    channel.post(bucket.nbytes)
                if at + 1 < len(buckets):
                    channel.post(buckets[at + 1].nbytes)
                buffer = channel.take()
            yield bucket, buffer

    def _channel(self, name: str, check: Callable[[], None]) -> ReceiveChannel:
        timeout = self.invitation.timeout
        if self._kind == "ipc":
            generation = self.messages.get(f"{name}/slots", timeout, check)
            if generation != self._generation:
                self._slots = []
                self._slots = open_shared(self.messages, f"slots/{generation}", timeout=timeout, check=check)
                self._generation = generation
            return IpcReceiver(self.messages, name, self._slots, self._device, timeout=timeout, check=check)
        if self._group is None:
            raise TransferError("the connection to the trainer is closed: the trainer must send a new invitation")
        return GroupReceiver(self._group, self._device, timeout=timeout, check=check)

    def _check(self, name: str) -> Callable[[], None]:
        def check() -> None:
            if self.messages.has(f"{name}/stop"):
                raise TransferError(f"the trainer has stopped this push: {self.messages.get(f'{name}/stop', 1.0)}")
            if self.messages.has(f"{name}/failed"):
                raise TransferError(f"another worker has failed: {self.messages.get(f'{name}/failed', 1.0)}")

        return check

    @contextlib.contextmanager
    def _trainer_lives(self) -> Iterator[None]:
        """Say what has happened when the trainer's store does not answer any more."""
        try:
            yield
        except dist.DistNetworkError as error:
            raise TransferError(f"the trainer is gone: {error}") from error
        except dist.DistError as error:
            raise TransferError(f"the connection to the trainer failed: {error}") from error


class _Seconds:
    """Time by what it was spent in."""

    def __init__(self) -> None:
        self.spent = {"receive_seconds": 0.0, "load_seconds": 0.0}

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent[f"{what}_seconds"] += time.monotonic() - start


class _Proofs:
    """Checksums of all buckets, compared once at the end, so that the device does not wait for the host."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._equal: list[Tensor] = []
        self._buckets: list[Bucket] = []
        self._sha256: dict[str, str] = {}

    def checked(self, arrivals: Iterator[tuple[Bucket, Tensor]]) -> Iterator[tuple[Bucket, Tensor]]:
        for bucket, buffer in arrivals:
            self._equal.append(checksums_equal(*bucket.split(buffer)))
            self._buckets.append(bucket)
            if self._manifest.sha256:
                self._sha256 |= {place.name: sha256(place.view(buffer)) for place in bucket.places}
            yield bucket, buffer
            del buffer

    def compare(self, end: bytes) -> None:
        """Raise when a checksum or a digest differs from the trainer's."""
        for bucket, equal in zip(self._buckets, torch.stack(self._equal).tolist() if self._equal else [], strict=True):
            if not equal:
                first, last = bucket.places[0].name, bucket.places[-1].name
                raise TransferError(f"the checksum of the tensors from {first} to {last} is wrong: bytes have changed")
        expected = {name: found for found, _, name in (line.partition(" ") for line in end.decode().splitlines())}
        if self._manifest.sha256 and expected.keys() != self._manifest.tensors.keys():
            raise TransferError("the trainer has not sent the SHA-256 of every tensor")
        for name, digest in expected.items():
            if self._sha256.get(name) != digest:
                raise TransferError(f"SHA-256 of {name}: expected {digest}, got {self._sha256.get(name)}")


def _to_host(buffer: Tensor) -> Tensor:
    """A copy in the host's memory, pinned where there is a GPU."""
    if buffer.device.type == "cpu":
        return buffer
    host = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
    return host.copy_(buffer)


def own_address(invitation: Invitation) -> str:
    """The address of this machine from which the trainer is reached."""
    family = socket.AF_INET6 if ":" in invitation.address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((invitation.address, invitation.port))
        return str(probe.getsockname()[0])
