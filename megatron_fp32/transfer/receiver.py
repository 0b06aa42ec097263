"""The engine's end: what one worker of any engine does to receive a push and to know that it is whole."""

from __future__ import annotations

import collections
import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.errors import TransferError, summary
from megatron_fp32.transfer.buckets import Bucket, plan_buckets
from megatron_fp32.transfer.channels import (
    Group,
    GroupReceiver,
    IpcReceiver,
    Kind,
    ReceiveChannel,
    open_group,
    open_shared,
)
from megatron_fp32.transfer.checksum import checksums_equal
from megatron_fp32.transfer.manifest import Manifest
from megatron_fp32.transfer.rendezvous import LONG, Invitation, Messages, join_store, wait_until
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
        self.messages = Messages(join_store(invitation), invitation.secret, timeout=invitation.timeout)
        self._group: Group | None = None
        self._kind: Kind | None = None
        self._slots: list[Tensor] = []
        self._generation = 0

    def meet(self) -> None:
        """Say hello, and open the channel together with the trainer and the other workers.

        Raises:
            TransferError: when the trainer or another worker does not come, or gives up.
        """
        timeout, messages = self.invitation.timeout, self.messages

        def check() -> None:
            messages.raise_if("refused", "the trainer and the engine did not connect")

        with self._told("refused"):
            messages.put(f"hello/{self._rank}", self._about | describe_device(self._device))
            kind: Kind = messages.get("channel", timeout, check)
            if kind != "ipc":
                self._group = open_group(
                    kind,
                    messages,
                    self._rank + 1,
                    self.invitation.world_size,
                    self._device,
                    address=own_address(self.invitation),
                    timeout=timeout,
                    check=check,
                )
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
        if self._kind is None:
            raise TransferError("the connection to the trainer is closed: the trainer must send a new invitation")
        name = f"push/{push}"
        with self._told(f"{name}/failed"):
            report = self._receive(name, load, finish, stage)
            self.messages.put(f"{name}/report/{self._rank}", report)

    def close(self) -> None:
        """Let go of the channel. A receiver that is closed needs a new invitation."""
        group, self._group, self._kind, self._slots, self._generation = self._group, None, None, [], 0
        if group is not None:
            group.close()

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Tell the trainer and the other workers of a failure, and let go of the channel."""
        try:
            with self._trainer_lives():
                yield
        except BaseException as error:
            with contextlib.suppress(Exception):  # the trainer may be gone, and this error is the one to raise
                # The first failure is the reason of all others.
                if not self.messages.has(name):
                    self.messages.put(name, f"worker {self._rank}: {summary(error, LONG)}")
            self.close()
            raise

    def _receive(self, name: str, load: Load, finish: Finish, stage: Stage) -> dict[str, Any]:
        check = self._check(name)
        timeout = self.invitation.timeout
        manifest = Manifest.from_bytes(self.messages.get_bytes(f"{name}/manifest", timeout, check))
        buckets = plan_buckets(manifest.tensors, manifest.bucket_bytes)
        seconds = _Seconds()
        proofs = _Proofs(manifest)
        arrivals = proofs.checked(self._arrivals(buckets, self._channel(name, check), seconds))
        if stage == "host":

            def compare() -> None:
                proofs.compare(self._end(name, check))
                self._agree(name, check)

            arrivals = self._staged(arrivals, compare)
        touched = False
        for bucket, buffer in arrivals:
            if not touched:
                self.messages.count(f"{name}/touched", 1)
                touched = True
            with seconds.of("load"):
                load([(place.name, place.view(buffer)) for place in bucket.places])
            del buffer  # before there is room for the next one
        if stage == "device":
            proofs.compare(self._end(name, check))
        with seconds.of("load"):
            facts = finish(manifest)
        nbytes = sum(info.nbytes for info in manifest.tensors.values())
        return {"rank": self._rank, "tensors": len(manifest.tensors), "nbytes": nbytes, **seconds.spent, **facts}

    def _agree(self, name: str, check: Callable[[], None]) -> None:
        """Wait until the push has been found whole by all workers: the model of each is touched, or of none."""
        whole = f"{name}/whole"
        self.messages.count(whole, 1)
        wait_until(
            lambda: self.messages.count(whole) >= self.invitation.world_size,
            "the other workers to find the push whole",
            self.invitation.timeout,
            check,
        )

    def _end(self, name: str, check: Callable[[], None]) -> Any:
        return self.messages.get(f"{name}/end", self.invitation.timeout, check)

    def _staged(
        self, arrivals: Iterator[tuple[Bucket, Tensor]], compare: Callable[[], None]
    ) -> Iterator[tuple[Bucket, Tensor]]:
        """All buckets after the last one has come, from the host's memory."""
        held: collections.deque[tuple[Bucket, Tensor]] = collections.deque()
        for bucket, buffer in arrivals:
            held.append((bucket, _to_host(buffer)))
            del buffer
        compare()
        while held:
            bucket, buffer = held.popleft()
            yield bucket, buffer.to(self._device)

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
            del buffer

    def _channel(self, name: str, check: Callable[[], None]) -> ReceiveChannel:
        timeout = self.invitation.timeout
        if self._kind == "ipc":
            generation = self.messages.get(f"{name}/slots", timeout, check)
            if generation != self._generation:
                self._slots = []
                self._slots = open_shared(self.messages, f"slots/{generation}", timeout=timeout, check=check)
                self._generation = generation
            return IpcReceiver(self.messages, name, self._slots, self._device, timeout=timeout, check=check)
        assert self._group is not None
        return GroupReceiver(self._group, self._device, timeout=timeout, check=check)

    def _check(self, name: str) -> Callable[[], None]:
        def check() -> None:
            self.messages.raise_if(f"{name}/stop", "the trainer has stopped this push")
            self.messages.raise_if(f"{name}/failed", "another worker has failed")

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

    def compare(self, expected: Any) -> None:
        """Raise when a checksum or a digest differs from the trainer's.

        Args:
            expected: SHA-256 by the name of a tensor; empty when the manifest has none.
        """
        for bucket, equal in zip(self._buckets, torch.stack(self._equal).tolist() if self._equal else [], strict=True):
            if not equal:
                first, last = bucket.places[0].name, bucket.places[-1].name
                raise TransferError(f"the checksum of the tensors from {first} to {last} is wrong: bytes have changed")
        names = self._manifest.tensors.keys() if self._manifest.sha256 else set()
        if not isinstance(expected, dict) or expected.keys() != names:
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
