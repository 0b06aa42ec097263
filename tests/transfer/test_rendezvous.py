"""The store: who reaches it, what it tells, and how long anybody waits for it."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from typing import Any

import pytest
import torch

from megatron_fp32.errors import TransferError
from megatron_fp32.transfer.receiver import Receiver, own_address
from megatron_fp32.transfer.rendezvous import (
    MAX_MESSAGE_BYTES,
    MAX_PARTS,
    Invitation,
    Messages,
    is_loopback,
    join_store,
    open_store,
    wait_until,
)
from megatron_fp32.transfer.sender import Connection
from tests.transfer.processes import CONTEXT

SECRET = "0123456789abcdef"


@pytest.fixture
def messages() -> Messages:
    store, _ = open_store("127.0.0.1", 5.0)
    return Messages(store, SECRET, timeout=5.0)


@pytest.fixture
def connection() -> Iterator[Connection]:
    made = Connection(workers=1, listen="127.0.0.1", device=torch.device("cpu"), timeout=0.5)
    yield made
    made.close()


class TestMessages:
    @pytest.mark.parametrize("value", [None, 0, "", [], {"ä\n": [1.5, None, True]}])
    def test_a_value_comes_back(self, messages: Messages, value: Any) -> None:
        assert not messages.has("a")
        messages.put("a", value)
        assert messages.has("a")
        assert messages.get("a", 1.0) == value

    @pytest.mark.parametrize("size", [0, 1, MAX_MESSAGE_BYTES, MAX_MESSAGE_BYTES + 1, 3 * MAX_MESSAGE_BYTES])
    def test_bytes_of_any_length_come_back(self, messages: Messages, size: int) -> None:
        data = os.urandom(size)
        messages.put_bytes("a", data)
        assert messages.get_bytes("a", 1.0) == data

    def test_what_nobody_reads_is_refused(self, messages: Messages) -> None:
        data = bytes(MAX_PARTS * MAX_MESSAGE_BYTES + 1)
        with pytest.raises(TransferError, match=rf"has {len(data)} bytes, and {len(data) - 1} fit"):
            messages.put_bytes("a", data)
        messages.store.set("b", str(MAX_PARTS + 1))
        with pytest.raises(TransferError, match=f"has {MAX_PARTS + 1} parts, and at most {MAX_PARTS} are read"):
            messages.get("b", 1.0)

    def test_what_is_forgotten_takes_no_memory(self, messages: Messages) -> None:
        before = messages.store.num_keys()
        messages.put_bytes("a", bytes(2 * MAX_MESSAGE_BYTES))
        messages.forget("a")
        messages.forget("b")
        assert not messages.has("a")
        assert messages.store.num_keys() == before

    def test_a_counter_adds(self, messages: Messages) -> None:
        assert [messages.count("a"), messages.count("a", 2), messages.count("a", -1)] == [0, 2, 1]

    def test_who_waits_hears_the_check_and_the_time_out(self, messages: Messages) -> None:
        start = time.monotonic()
        with pytest.raises(TransferError, match=r"^waited 0\.2 s for the message 'a'$"):
            messages.get("a", 0.2)
        assert time.monotonic() - start >= 0.2

        def check() -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            messages.get("a", 60.0, check)

    def test_the_thread_ends_with_the_messages(self) -> None:
        before = set(threading.enumerate())
        store, _ = open_store("127.0.0.1", 5.0)
        made = Messages(store, SECRET)
        (thread,) = set(threading.enumerate()) - before
        assert thread.name == "megatron_fp32 messages"
        del made
        gc.collect()
        thread.join(5.0)
        assert not thread.is_alive()


def serve(pipe: Pipe) -> None:
    store, port = open_store("127.0.0.1", 5.0)
    pipe.send(port)
    pipe.recv()
    del store


def test_a_store_that_is_stopped_hangs_nobody() -> None:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    try:
        invitation = Invitation(address="127.0.0.1", port=ours.recv(), secret=SECRET, world_size=1, timeout=5.0)
        messages = Messages(join_store(invitation), SECRET, timeout=1.5)
        assert messages.count("a", 1) == 1
        os.kill(process.pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(TransferError, match=r"the trainer's store did not answer within 1\.5 s"):
            messages.get("b", 60.0)
        with pytest.raises(TransferError, match=r"did not answer"):
            messages.count("c", 1)
        assert time.monotonic() - start < 60, "the store's time-out counts, not that of the message"
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: messages.count("c") == 1, "what was counted meanwhile", 5.0)
        assert messages.count("a") == 1
    finally:
        process.kill()
        process.join()


class TestStore:
    def test_it_listens_on_its_address_alone(self) -> None:
        store, port = open_store("127.0.0.1", 5.0)
        with socket.create_connection(("127.0.0.1", port), timeout=2):
            pass
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port), timeout=2)
        del store

    def test_so_does_gloo(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from megatron_fp32.transfer.channels import _make_group

        store, port = open_store("127.0.0.3", 5.0)
        before = listening()
        group = _make_group("gloo", Messages(store, SECRET), 0, 1, address="127.0.0.3", timeout=5.0)
        assert {address for address, _ in listening() - before} <= {"127.0.0.3"}
        assert ("127.0.0.3", port) in before
        del group

    def test_an_address_of_another_machine_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"listen must be an address of this machine, got '192\.0\.2\.1'"):
            open_store("192.0.2.1", 5.0)

    def test_nobody_answers(self) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
        start = time.monotonic()
        invitation = Invitation(address="127.0.0.1", port=port, secret=SECRET, world_size=1, timeout=1.0)
        with pytest.raises(TransferError, match=rf"no trainer answers at 127\.0\.0\.1:{port}"):
            Receiver(invitation, rank=0, device=torch.device("cpu"), about={})
        assert time.monotonic() - start < 60, "torch's own time-out is five minutes"


class TestSecrets:
    def test_a_worker_with_another_secret_hears_nothing(self, connection: Connection) -> None:
        connection.messages.put("channel", "gloo")
        invitation = Invitation(
            address="127.0.0.1", port=connection.invitation.port, secret="guessed", world_size=1, timeout=0.3
        )
        receiver = Receiver(invitation, rank=0, device=torch.device("cpu"), about={})
        with pytest.raises(TransferError, match=r"waited 0\.3 s for the message 'channel'"):
            receiver.meet()
        with pytest.raises(TransferError, match=r"waited 0\.5 s for the message 'hello/0'"):
            connection.meet(lambda: None)

    def test_keys_do_not_show_the_secret(self, connection: Connection) -> None:
        connection.messages.put("channel", "gloo")
        keys = join_store(connection.invitation).list_keys()
        assert any(key.endswith("/channel") for key in keys)
        assert not any(connection.invitation.secret in key for key in keys)

    def test_each_connection_has_its_own(self, connection: Connection) -> None:
        other = Connection(workers=1, listen="127.0.0.1", device=torch.device("cpu"), timeout=0.5)
        assert other.invitation.secret != connection.invitation.secret
        assert len(other.invitation.secret) >= 32
        other.close()


def test_a_receiver_that_is_closed_waits_for_nothing(connection: Connection) -> None:
    receiver = Receiver(connection.invitation, rank=0, device=torch.device("cpu"), about={})
    receiver.close()
    with pytest.raises(TransferError, match=r"is closed: the trainer must send a new invitation"):
        receiver.receive(1, lambda tensors: None, lambda manifest: {}, stage="device")
    assert not connection.messages.has("push/1/failed")


def test_a_connection_may_be_closed_twice(connection: Connection) -> None:
    connection.close()
    connection.close()


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_worker_too_many_is_refused(rank: int) -> None:
    invitation = Invitation(address="127.0.0.1", port=1, secret=SECRET, world_size=2, timeout=0.3)
    with pytest.raises(TransferError, match=f"this worker has rank {rank}, and the trainer expects 2 workers"):
        Receiver(invitation, rank=rank, device=torch.device("cpu"), about={})


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("10.0.0.1", False), ("", False)],
)
def test_loopback_addresses(address: str, expected: bool) -> None:
    assert is_loopback(address) == expected


def test_a_worker_listens_where_it_sees_the_trainer() -> None:
    invitation = Invitation(address="127.0.0.1", port=9, secret=SECRET, world_size=1, timeout=1.0)
    assert own_address(invitation) == "127.0.0.1"


def listening() -> set[tuple[str, int]]:
    """Addresses and ports of IPv4 sockets of this process that listen; those of IPv6 are asserted to be none."""
    own = set()
    for file in os.listdir("/proc/self/fd"):
        try:
            own.add(os.readlink(f"/proc/self/fd/{file}"))
        except OSError:
            continue
    found = set()
    for table in ("tcp", "tcp6"):
        with open(f"/proc/self/net/{table}") as lines:
            for line in list(lines)[1:]:
                fields = line.split()
                if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                    address, _, port = fields[1].partition(":")
                    text = socket.inet_ntoa(bytes.fromhex(address)[::-1]) if table == "tcp" else address
                    found.add((text, int(port, 16)))
    return found
