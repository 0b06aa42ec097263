"""Where a trainer and the workers of an engine meet: a store of small messages in the trainer's process.

The store is torch's TCPStore. Its server listens on one address alone. All keys begin with a hash of a secret that only
the engine gets, with the request that invites it. A torch that reaches the port can still list these keys, read their
values and change them (`TCPStore.list_keys`), so that the network of `listen` must be one that is trusted.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
import ipaddress
import json
import queue
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_fp32.errors import TransferError

MAX_MESSAGE_BYTES = 4 << 20
"""Of one value. The server of TCPStore refuses more than 8 MiB."""
LONG = 2000
"""Characters of an error that one side tells the other; see `summary`."""
MAX_PARTS = 64
"""Of a longer message."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Invitation:
    """What a worker of the engine needs to join: sent over the engine's own control plane, for example HTTP."""

    address: str
    port: int
    secret: str
    world_size: int
    """Workers of the engine."""
    timeout: float
    """Seconds that a side waits for the other one."""


class Messages:
    """Messages between the trainer and the workers of one engine, by name.

    Every method raises TransferError when the store does not answer in time, and torch's DistNetworkError when the
    process of the store has ended.

    Args:
        store: of the trainer's process, or a client of it.
        secret: see `Invitation`.
        timeout: seconds that the store has for an answer.
    """

    def __init__(self, store: Any, secret: str, *, timeout: float = 60.0) -> None:
        # Keys can be listed, so the secret itself is none.
        self.store = dist.PrefixStore(hashlib.sha256(f"keys {secret}".encode()).hexdigest(), store)
        self._timeout = timeout
        self._late: Future[Any] | None = None
        self._tasks: _Tasks = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._tasks,), name="megatron_fp32 messages", daemon=True).start()
        weakref.finalize(self, self._tasks.put, None)

    def put(self, name: str, value: Any) -> None:
        """Publish a value that JSON can hold."""
        self.put_bytes(name, json.dumps(value).encode())

    def put_bytes(self, name: str, data: bytes) -> None:
        """Publish bytes, in parts that the store takes.

        Raises:
            TransferError: for more than `MAX_PARTS` parts.
        """
        parts = [data[start : start + MAX_MESSAGE_BYTES] for start in range(0, len(data), MAX_MESSAGE_BYTES)] or [b""]
        if len(parts) > MAX_PARTS:
            raise TransferError(f"the message {name!r} has {len(data)} bytes, and {MAX_PARTS * MAX_MESSAGE_BYTES} fit")
        for at, part in enumerate(parts):
            # TCPStore does not tell an empty value from none.
            value: Any = b"+" + part  # torch's annotation lacks bytes
            self._ask(functools.partial(self.store.set, f"{name}/{at}", value))
        self._ask(lambda: self.store.set(name, str(len(parts))))

    def forget(self, name: str) -> None:
        """Free the memory of a message that everybody has read."""
        if self.has(name):
            parts = int(self._ask(lambda: self.store.get(name)))
            for key in (name, *(f"{name}/{at}" for at in range(parts))):
                self._ask(functools.partial(self.store.delete_key, key))

    def has(self, name: str) -> bool:
        """Whether the value is there."""
        return bool(self._ask(lambda: self.store.check([name])))

    def get(self, name: str, timeout: float, check: Callable[[], None] = lambda: None) -> Any:
        """Wait for a value.

        Args:
            name: of the value.
            timeout: seconds.
            check: is called while this waits, and raises when there is no more to wait for.

        Raises:
            TransferError: after the time-out.
        """
        return json.loads(self.get_bytes(name, timeout, check))

    def get_bytes(self, name: str, timeout: float, check: Callable[[], None] = lambda: None) -> bytes:
        """Wait for bytes; see `get`."""
        wait_until(lambda: self.has(name), f"the message {name!r}", timeout, check)
        parts = int(self._ask(lambda: self.store.get(name)))
        if not 0 < parts <= MAX_PARTS:
            raise TransferError(f"the message {name!r} has {parts} parts, and at most {MAX_PARTS} are read")
        return b"".join(bytes(self._ask(functools.partial(self.store.get, f"{name}/{at}")))[1:] for at in range(parts))

    def raise_if(self, name: str, what: str) -> None:
        """Raise a TransferError with a message, if there is one.

        Args:
            name: of the message, a text.
            what: has happened.
        """
        if self.has(name):
            raise TransferError(f"{what}: {self.get(name, self._timeout)}")

    def count(self, name: str, more: int = 0) -> int:
        """Add to a counter; its value afterwards."""
        return int(self._ask(lambda: self.store.add(f"count/{name}", more)))

    def _ask(self, operation: Callable[[], T]) -> T:
        """Run an operation of the store in a thread that may wait.

        A client of TCPStore waits for ever when the server's process is stopped, or its machine has lost power.
        """
        late = self._late is not None and not self._late.done()
        answer: Future[T] = Future()
        self._tasks.put((operation, answer))
        try:
            # After one answer that did not come, nobody should wait long for the others.
            return answer.result(min(1.0, self._timeout) if late else self._timeout)
        except TimeoutError:
            if answer.done():
                raise
            self._late = answer
            raise TransferError(f"the trainer's store did not answer within {self._timeout:g} s") from None


_Tasks = queue.SimpleQueue[tuple[Callable[[], Any], "Future[Any]"] | None]


def _serve(tasks: _Tasks) -> None:
    while (task := tasks.get()) is not None:
        operation, answer = task
        settle(operation, answer)
        del task, operation, answer  # the store must not live until the next task


def settle(operation: Callable[[], T], answer: Future[T]) -> None:
    """Put what a function returns or raises into its answer."""
    try:
        answer.set_result(operation())
    except BaseException as error:
        answer.set_exception(error)


def wait_until(
    done: Callable[[], bool], what: str, timeout: float, check: Callable[[], None] = lambda: None, poll: float = 0.00005
) -> None:
    """Wait until something is so.

    The store's own blocking calls cannot be interrupted, and NCCL's time-outs end the process.

    Raises:
        TransferError: after `timeout` seconds.
    """
    start = checked = time.monotonic()
    while not done():
        now = time.monotonic()
        if now - checked > 0.01:  # a check asks the store, too
            check()
            checked = now
        if now - start > timeout:
            raise TransferError(f"waited {timeout:g} s for {what}")
        time.sleep(poll)
        poll = min(poll * 1.1, 0.01)


def open_store(listen: str, timeout: float) -> tuple[Any, int]:
    """A store whose server listens on this address alone, and the server's port.

    Raises:
        ValueError: when the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in listen else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.bind((listen, 0))
        server.listen(1024)
    except OSError as error:
        server.close()
        raise ValueError(f"listen must be an address of this machine, got {listen!r}: {error}") from error
    port = server.getsockname()[1]
    store = dist.TCPStore(
        host_name=listen,
        port=port,
        is_master=True,
        wait_for_workers=False,
        timeout=datetime.timedelta(seconds=timeout),
        # The store closes this file descriptor; it must be the store's own.
        master_listen_fd=server.detach(),
    )
    return store, port


def join_store(invitation: Invitation) -> Any:
    """The trainer's store, from a worker of the engine.

    Raises:
        TransferError: when nothing answers at that address.
    """
    try:
        return dist.TCPStore(
            host_name=invitation.address,
            port=invitation.port,
            is_master=False,
            wait_for_workers=False,
            timeout=datetime.timedelta(seconds=invitation.timeout),
        )
    except (RuntimeError, OSError) as error:
        raise TransferError(
            f"no trainer answers at {invitation.address}:{invitation.port}: {type(error).__name__}: {error}"
        ) from error


def new_secret() -> str:
    """A name that nobody can guess."""
    return secrets.token_hex(16)


def is_loopback(address: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
