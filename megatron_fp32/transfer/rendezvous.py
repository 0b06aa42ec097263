"""Where a trainer and the workers of an engine meet: a store of small messages in the trainer's process.

The store is torch's TCPStore. Its server listens on one address alone. All keys begin with a secret that only the
engine gets, with the request that invites it.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import json
import secrets
import socket
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from megatron_fp32.errors import TransferError

MAX_MESSAGE_BYTES = 4 << 20
"""Of one value. The server of TCPStore refuses more than 8 MiB."""


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

    Args:
        store: of the trainer's process, or a client of it.
        secret: see `Invitation`.
    """

    def __init__(self, store: Any, secret: str) -> None:
        self.store = dist.PrefixStore(secret, store)

    def put(self, name: str, value: Any) -> None:
        """Publish a value that JSON can hold."""
        self.put_bytes(name, json.dumps(value).encode())

    def put_bytes(self, name: str, data: bytes) -> None:
        """Publish bytes of any length, in parts that the store takes."""
        parts = [data[start : start + MAX_MESSAGE_BYTES] for start in range(0, len(data), MAX_MESSAGE_BYTES)] or [b""]
        for at, part in enumerate(parts):
            # TCPStore does not tell an empty value from none.
            self.store.set(f"{name}/{at}", b"+" + part)  # type: ignore[arg-type]
        self.store.set(name, str(len(parts)))

    def has(self, name: str) -> bool:
        """Whether the value is there."""
        return bool(self.store.check([name]))

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
        parts = int(self.store.get(name))
        return b"".join(bytes(self.store.get(f"{name}/{at}"))[1:] for at in range(parts))

    def count(self, name: str, more: int = 0) -> int:
        """Add to a counter; its value afterwards."""
        return int(self.store.add(f"count/{name}", more))


def wait_until(
    done: Callable[[], bool], what: str, timeout: float, check: Callable[[], None] = lambda: None, poll: float = 0.00005
) -> None:
    """Wait until something is so.

    The store's own blocking calls cannot be interrupted, and NCCL's time-outs end the process.

    Raises:
        TransferError: after `timeout` seconds.
    """
    start = time.monotonic()
    while not done():
        check()
        if time.monotonic() - start > timeout:
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
