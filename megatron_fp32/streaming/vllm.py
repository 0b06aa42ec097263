"""A sink that puts weights into engines of vLLM, which run the plugin of this package."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
import urllib.parse
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_fp32.errors import TransferError
from megatron_fp32.streaming.control import Call, Control, HttpControl, LlmControl
from megatron_fp32.streaming.sinks import EngineReceipt, Upload
from megatron_fp32.transfer.manifest import Manifest
from megatron_fp32.transfer.rendezvous import is_loopback
from megatron_fp32.transfer.sender import Connection, Push
from megatron_fp32.validation import check_choice, check_count, check_flag
from megatron_fp32.weights.fp8.config import scheme_from_config
from megatron_fp32.weights.fp8.scheme import Fp8Scheme

logger = logging.getLogger(__name__)

TOKEN = "MEGATRON_FP32_TOKEN"
INCOMPLETE = "incomplete"
"""The version of an engine whose model holds a part of a push."""

InFlight = Literal["keep", "recompute", "wait", "abort"]
Channel = Literal["auto", "gloo", "nccl", "ipc"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VllmOptions:
    """How `VllmSink` sends, and what becomes of the requests of the engine."""

    channel: Channel = "auto"
    """How the bytes cross. "auto" takes gloo for engines on CPUs, NCCL between GPUs, and CUDA IPC on a shared GPU."""
    in_flight: InFlight = "keep"
    """What becomes of requests that run: "keep" lets them continue with the KV cache of the old weights, "recompute"
    computes that cache again with the new ones, "wait" lets them end before the push, "abort" ends them."""
    prefix_cache: Literal["reset", "keep"] = "reset"
    """Whether the engine forgets the KV cache of prefixes, which old weights have made."""
    stage: Literal["device", "host"] = "device"
    """"host" lets the engine receive and check everything in its host's memory before its model is touched. A push that
    fails then leaves the engine with the version that it had."""
    bucket_bytes: int = 1 << 30
    """Tensors travel in buffers of this size; the trainer and every worker have two of them. A larger tensor gets a
    buffer of its own size."""
    sha256: bool = False
    """Compare SHA-256 of every tensor too. The checksum that is always compared finds faults, not attacks."""
    wake: bool = False
    """The engine sleeps: wake its weights before the push, and its KV cache afterwards."""
    timeout: float = 300.0
    """Seconds that one side waits for the other."""
    lease: float = 600.0
    """Seconds after which a paused engine acts by itself when the trainer is gone; 0 for never."""

    def __post_init__(self) -> None:
        check_choice("channel", self.channel, ("auto", "gloo", "nccl", "ipc"))
        check_choice("in_flight", self.in_flight, ("keep", "recompute", "wait", "abort"))
        check_choice("prefix_cache", self.prefix_cache, ("reset", "keep"))
        check_choice("stage", self.stage, ("device", "host"))
        check_count("bucket_bytes", self.bucket_bytes, least=1)
        check_flag("sha256", self.sha256)
        check_flag("wake", self.wake)
        for name, value in (("timeout", self.timeout), ("lease", self.lease)):
            if not isinstance(value, int | float) or value < 0:
                raise ValueError(f"{name} must be a number of seconds, got {value!r}")


class VllmSink:
    """Puts a push into an engine of vLLM; see `Sink`.

    The engine needs this package, and `--weight-transfer-config '{"backend": "megatron_fp32"}'`. A server also needs
    `VLLM_SERVER_DEV_MODE=1`. The sink connects at its first push, keeps the connection, and connects again after a
    failure. An engine whose push has failed stays paused and has no version until the next push.

    Args:
        engine: URL of a server, or an `LLM` object of this process.
        options: see `VllmOptions`.
        token: secret that the engine was started with (`MEGATRON_FP32_TOKEN`); None for this process's own.
        listen: address of this machine on which the engine reaches the trainer; None for the one that leads to the
            engine.
        headers: of every request, such as an authorization.

    Raises:
        TypeError: when `engine` is neither a URL nor an `LLM`.
    """

    def __init__(
        self,
        engine: str | Any,
        *,
        options: VllmOptions | None = None,
        token: str | None = None,
        listen: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.options = options or VllmOptions()
        if isinstance(engine, str):
            if urllib.parse.urlsplit(engine).scheme not in ("http", "https"):
                raise ValueError(f"engine must be a URL such as http://host:8000, got {engine!r}")
            self._control: Control = HttpControl(engine, timeout=self.options.timeout, headers=headers)
        elif hasattr(engine, "collective_rpc") and hasattr(engine, "llm_engine"):
            self._control = LlmControl(engine)
        else:
            raise TypeError(f"engine must be a URL or an LLM, got {type(engine).__name__}")
        self._token = token if token is not None else os.environ.get(TOKEN)
        self._listen = listen
        self._connection: Connection | None = None
        self._failed: Connection | None = None
        """Of a push that has failed: its heartbeat tells the engine that this trainer lives, until the next push."""
        self._push: Push | None = None
        self._call: Call | None = None
        self._busy = threading.Lock()
        self._owner: int | None = None
        self._spent: dict[str, float] = {}
        self._paused = False
        """Whether this push has paused the engine, which answered requests before."""
        self._named: str | None = None
        """The version that this push has replaced by `INCOMPLETE`."""
        self.receipt: EngineReceipt | None = None
        """Of the last push that has succeeded."""

    @property
    def name(self) -> str:
        """The engine's URL, or what it is."""
        return self._control.name

    def scheme(self, device: torch.device) -> Fp8Scheme | None:
        """The FP8 format in which the engine wants its weights, from the config of its model; None for none.

        Raises:
            CheckpointError: for a quantization that cannot be made from weights.
        """
        found = self._connected(device).hellos[0]["quantization"]
        return None if found is None else scheme_from_config(found)

    def begin(self, upload: Upload) -> None:
        """Connect, pause the engine, and announce the tensors.

        Raises:
            TransferError: when another push through this sink is not finished, or the engine refuses.
        """
        if not self._busy.acquire(blocking=False):
            raise TransferError(f"another push to {self.name} is not finished: a sink takes one at a time")
        self._owner, self._paused, self._named = threading.get_ident(), False, None
        self._upload, self._spent = upload, {}
        options = self.options
        with self._timed("connect"):
            connection = self._connected(upload.device)
        self._paused_at = time.monotonic()
        # The engine is paused while the first buckets are filled.
        number = connection.pushes + 1
        self._call = Call(lambda: self._receive(connection, number))
        self._push = Push(
            connection,
            Manifest(
                version=upload.version,
                tensors=upload.tensors,
                bucket_bytes=options.bucket_bytes,
                sha256=options.sha256,
                carried=tuple(upload.sidecar.carried),
            ),
            check=self._call.check,
        )

    def _receive(self, connection: Connection, push: int) -> None:
        """Pause the engine, and let it receive the push with this number.

        The update begins before the pause, so that an engine that refuses the push is not paused, and so that the
        engine's lease knows of every pause.
        """
        options = self.options
        with self._timed("begin"):
            connection.messages.count("paused", 1)
            self._start(connection, new=push == 1)
            self._paused = not self._control.is_paused()
            self._control.pause("keep" if options.in_flight == "recompute" else options.in_flight)
            if options.wake:
                self._control.wake("weights")
            version = self._control.version()
            if options.stage == "device":
                self._named = version
                self._control.name_version(INCOMPLETE)
        info = {"push": push, "secret": connection.invitation.secret, "stage": options.stage, "version": version}
        self._control.update(info)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor into its bucket, which leaves when it is full."""
        assert self._push is not None
        self._push.write(name, tensor)

    def finish(self) -> None:
        """Wait until every worker has loaded and checked everything, name the version, and let the engine go on.

        Raises:
            TransferError: when a worker has not.
        """
        assert self._push is not None
        assert self._call is not None
        assert self._connection is not None
        options = self.options
        self._push.finish()
        with self._timed("load"):
            self._call.join(options.timeout)
            reports = self._push.reports(options.timeout, self._call.check)
        with self._timed("end"):
            self._control.finish(str(self._upload.version))
            if options.wake:
                self._control.wake("kv_cache")
            if options.prefix_cache == "reset" or options.in_flight == "recompute":
                self._control.reset_caches(running=options.in_flight == "recompute")
            self._control.resume()
        self._connection.messages.count("paused", -1)
        self._spent |= {
            "send": self._push.seconds,
            "wait": self._push.waited,
            "pause": time.monotonic() - self._paused_at,
        }
        self.receipt = EngineReceipt(
            engine=self.name,
            version=self._upload.version,
            channel=str(self._connection.kind),
            seconds=self._spent,
            workers=tuple(reports),
            rounded=tuple(sorted({name for report in reports for name in report["rounded"]})),
        )
        self._done()

    def abort(self, error: BaseException) -> None:
        """End the push in the engine. It stays paused and has no version, unless its model was not touched."""
        if self._owner != threading.get_ident():
            return  # this push was refused because another one runs
        connection, push, call = self._connection, self._push, self._call
        try:
            touched = False
            if connection is not None and push is not None and call is not None:
                push.stop(error)
                touched = self._wait_for_end(connection, push, call)
            if not touched:
                self._restore()
        finally:
            self._connection, self._failed = None, connection
            if connection is not None:
                connection.stop_sending()
            self._done()

    def _restore(self) -> None:
        """Leave the engine as this push has found it: an engine with half of a model stays paused."""
        if self._named is not None:
            self._control.name_version(self._named)
        if self._paused:
            self._control.resume()
            logger.warning("%s continues with the version that it had", self.name)
        if self._connection is not None:
            self._connection.messages.count("paused", -1)

    def close(self) -> None:
        """Leave the engine as it is."""
        for connection in (self._connection, self._failed):
            if connection is not None:
                connection.close()
        self._connection = self._failed = None

    def _wait_for_end(self, connection: Connection, push: Push, call: Call) -> bool:
        """Whether the engine's model was touched, which is known when its workers have stopped."""
        try:
            call.join(connection.timeout)
        except TransferError as end:
            logger.debug("the engine's update ended: %s", end)
        return connection.messages.count(f"{push.name}/touched") > 0

    def _done(self) -> None:
        self._push, self._call, self._owner = None, None, None
        self._busy.release()

    def _start(self, connection: Connection, *, new: bool) -> None:
        """Begin an update, also on an engine whose last trainer has died between beginning and sending.

        An engine accepts a new connection when no other trainer is in a push. Over an older connection, the update
        that has begun may be another trainer's.
        """
        try:
            self._control.start()
        except TransferError as error:
            if "already" not in str(error) or not new:
                raise
            cancel = {"push": 0, "secret": connection.invitation.secret, "cancel": True}
            try:
                self._control.update(cancel)
            except TransferError as answer:
                logger.debug("the push of an earlier trainer was given up: %s", answer)
            self._control.start()

    def _connected(self, device: torch.device) -> Connection:
        if self._connection is not None:
            return self._connection
        options = self.options
        connection = Connection(
            workers=self._control.workers(),
            listen=self._listen or address_towards(self._control.url),
            device=device,
            channel=options.channel,
            timeout=options.timeout,
        )
        try:
            info = dataclasses.asdict(connection.invitation)
            info |= {"token": self._token, "lease": options.lease, "url": self._control.url}
            call = Call(lambda: self._control.invite(info))
            connection.meet(call.check)
            call.join(options.timeout)
        except BaseException:
            connection.close()
            raise
        self._connection, failed, self._failed = connection, self._failed, None
        if failed is not None:
            failed.close()
        return connection

    def _timed(self, what: str) -> _Timer:
        return _Timer(lambda seconds: self._spent.update({what: seconds}))


class _Timer:
    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell = tell

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *error: object) -> None:
        self._tell(time.monotonic() - self._start)


def address_towards(url: str | None) -> str:
    """The address of this machine that an engine sees: the loopback address for an engine on this machine."""
    host = urllib.parse.urlsplit(url or "").hostname or "127.0.0.1"
    if is_loopback(host):
        return "127.0.0.1"
    family, *_, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
