"""A sink that puts weights into servers of SGLang, over the routes that SGLang has for this."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from megatron_fp32.errors import TransferError, summary
from megatron_fp32.streaming.sglang_buckets import FlatBucket, plan_flat_buckets
from megatron_fp32.streaming.sglang_control import NoRouteError, SGLangControl
from megatron_fp32.streaming.sglang_transport import Backend, Broadcasts, Flight, Handles, Transport
from megatron_fp32.streaming.sinks import EngineReceipt, Upload
from megatron_fp32.streaming.vllm import INCOMPLETE, address_towards
from megatron_fp32.validation import check_choice, check_count, check_flag, check_number

logger = logging.getLogger(__name__)

PAUSES = {"abort": "abort", "recompute": "retract", "keep": "in_place"}
"""SGLang's names for what becomes of requests that run. It has none for "wait"."""

ROUNDED = (".linear_attn.norm.weight", "lm_head.weight")
"""Ends of names whose fp32 values SGLang 0.5.23 keeps in the model's dtype. It does not tell: read in its models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SGLangOptions:
    """How `SGLangSink` sends, and what becomes of the requests of the server."""

    transport: Literal["distributed", "tensor"] = "distributed"
    """"distributed" broadcasts in a process group. "tensor" is for a server on the same machine and GPU: it sends a
    pickle, which SGLang unpickles with a list of allowed names, and which holds CUDA IPC handles instead of bytes."""
    backend: Backend | Literal["auto"] = "auto"
    """Of the process group. "auto" takes NCCL for tensors on a GPU, and gloo otherwise."""
    in_flight: Literal["recompute", "keep", "abort"] = "recompute"
    """What becomes of requests that run: "recompute" computes their KV cache again with the new weights ("retract" in
    SGLang), "keep" lets them continue with the old cache ("in_place"), "abort" ends them."""
    prefix_cache: Literal["reset", "keep"] = "reset"
    """Whether the server forgets its KV cache, which old weights have made. SGLang cannot while it keeps requests."""
    bucket_bytes: int = 1 << 29
    """Tensors travel in buffers of this size. The trainer has two of them, every rank of the server one. A larger
    tensor gets a buffer of its own size."""
    timeout: float = 300.0
    """Seconds that a request, or a step of the connection, may take."""
    take_over: bool = False
    """Push although another trainer's push is not finished. Only when that trainer is gone: two at once mix."""

    def __post_init__(self) -> None:
        check_choice("transport", self.transport, ("distributed", "tensor"))
        check_choice("backend", self.backend, ("auto", "nccl", "gloo"))
        check_choice("in_flight", self.in_flight, tuple(PAUSES))
        check_choice("prefix_cache", self.prefix_cache, ("reset", "keep"))
        check_count("bucket_bytes", self.bucket_bytes, least=1)
        check_number("timeout", self.timeout, positive=True)
        check_flag("take_over", self.take_over)
        if (self.in_flight, self.prefix_cache) == ("keep", "reset"):
            raise ValueError(
                "in_flight='keep' needs prefix_cache='keep', because SGLang does not forget its cache while requests "
                "use it. in_flight='recompute' computes their cache again"
            )


class SGLangSink:
    """Puts a push into a server of SGLang; see `Sink`.

    The server needs no code of this package. It has one data parallel and one pipeline parallel rank, and any number of
    tensor parallel ones. The sink connects at its first push, keeps the connection, and connects again after a failure.
    A server whose push has failed stays paused, and its version begins with "incomplete", until the next push. Unlike
    with vLLM, nobody compares checksums, and SGLang does not tell whether a parameter has got all of its tensors.

    Args:
        url: of the server.
        options: see `SGLangOptions`.
        listen: address of this machine on which the server reaches the trainer; None for the one that leads to it.
        headers: of every request, such as an authorization.

    Raises:
        ValueError: when `url` is not a URL.
    """

    def __init__(
        self,
        url: str,
        *,
        options: SGLangOptions | None = None,
        listen: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"url must be a URL such as http://host:30000, got {url!r}")
        self.options = options or SGLangOptions()
        self._control = SGLangControl(url, timeout=self.options.timeout, headers=headers)
        self._listen = listen
        self._mark = f"{INCOMPLETE}-{secrets.token_hex(4)}"
        """The version of a server that this sink has left with a part of a push."""
        self._transport: Transport | None = None
        self._busy = threading.Lock()
        self._owner: int | None = None
        self._clear()
        self.receipt: EngineReceipt | None = None
        """Of the last push that has succeeded."""

    def _clear(self) -> None:
        self._paused = self._sessions = False
        self._begun = False  # whether the server's model is, or may be, a part of a push
        self._buckets: list[FlatBucket] = []
        self._at = 0
        self._buffer: Tensor | None = None
        self._filled: set[str] = set()
        self._flight: Flight | None = None
        self._seconds: dict[str, float] = {}

    @property
    def name(self) -> str:
        """The server's URL."""
        return self._control.url

    def begin(self, upload: Upload) -> None:
        """Connect, pause the server, and open a session of updates.

        Raises:
            TransferError: when another push is not finished, or the server refuses.
        """
        if not self._busy.acquire(blocking=False):
            raise TransferError(f"another push to {self.name} is not finished: a sink takes one at a time")
        self._owner = threading.get_ident()
        self._clear()
        self._upload = upload
        self._order = iter(upload.tensors.items())
        self._buckets = plan_flat_buckets(upload.tensors, self.options.bucket_bytes)
        version = self._control.version() or ""
        if version.startswith(INCOMPLETE) and version != self._mark and not self.options.take_over:
            raise TransferError(self._unfinished())
        self._begun = version.startswith(INCOMPLETE)
        with self._timed("connect"):
            self._connect(upload.device)
        with self._timed("begin"):
            self._paused_at = time.monotonic()
            self._paused = True
            self._control.pause(PAUSES[self.options.in_flight])
            self._open_session(upload, mine=version == self._mark)
            self._control.name_version(self._mark)

    def _unfinished(self) -> str:
        return (
            f"{self.name}: the push of another trainer is not finished. If that trainer is gone, pass "
            "SGLangOptions(take_over=True)"
        )

    def _connect(self, device: torch.device) -> None:
        if self._transport is not None:
            return
        options = self.options
        if options.transport == "tensor":
            self._transport = Handles(self._control, device=device, timeout=options.timeout)
            return
        backend: Backend = "nccl" if device.type == "cuda" else "gloo"
        self._transport = Broadcasts(
            self._control,
            listen=self._listen or address_towards(self.name),
            backend=backend if options.backend == "auto" else options.backend,
            device=device,
            timeout=options.timeout,
        )

    def _open_session(self, upload: Upload, *, mine: bool) -> None:
        """Open a session. One that a failed push has left open goes on: closing it would complete half of a model."""
        try:
            self._control.begin()
        except NoRouteError as error:
            if upload.fp8 is not None:
                raise TransferError(
                    f"{self.name} has no /begin_weight_update, without which SGLang cannot load FP8 again: "
                    "0.5.23 has it, 0.5.17 does not"
                ) from error
            self._begun = True
            return
        except TransferError as error:
            if "already open" not in str(error):
                raise
            if not mine and not self.options.take_over:
                self._paused = False  # by the other push, not by this one
                raise TransferError(f"{self._unfinished()} ({error})") from error
        self._begun = self._sessions = True

    def write(self, name: str, tensor: Tensor) -> None:
        """Copy a tensor into its bucket, which leaves when it is full.

        Raises:
            TransferError: when another tensor was announced at this place, or the server has not loaded a bucket.
        """
        expected, info = next(self._order, (None, None))
        if info is None or (name, tensor.dtype, tuple(tensor.shape)) != (expected, info.dtype, info.torch_shape):
            raise TransferError(f"expected {expected!r} of {info}, got {name!r}: {tensor.dtype} {tuple(tensor.shape)}")
        bucket = self._buckets[self._at]
        if self._buffer is None:
            assert self._transport is not None
            self._buffer = self._transport.buffer(bucket.nbytes)
            self._targets = {place.name: place for place in bucket.places}
        self._targets[name].view(self._buffer).copy_(tensor.detach())
        self._filled.add(name)
        if len(self._filled) == len(bucket.places):
            self._send(bucket, self._buffer)

    def _send(self, bucket: FlatBucket, buffer: Tensor) -> None:
        assert self._transport is not None
        with self._timed("wait"):
            self._wait()
        with self._timed("send"):
            self._flight = self._transport.send(bucket, buffer)
        self._buffer, self._filled = None, set()
        self._at += 1

    def _wait(self) -> None:
        """Until the server has loaded the bucket that is on its way: it takes one at a time."""
        if self._flight is not None:
            self._flight.wait()
            self._flight = None

    def finish(self) -> None:
        """Wait until the server has loaded everything, name the version, and let the server go on.

        Raises:
            TransferError: when tensors are missing, or the server has not loaded them.
        """
        assert self._transport is not None
        if self._at != len(self._buckets):
            raise TransferError(f"{len(self._buckets) - self._at} of {len(self._buckets)} buckets were not sent")
        with self._timed("load"):
            self._wait()
        with self._timed("end"):
            if self._sessions:
                self._control.end()
            if self.options.prefix_cache == "reset":
                self._control.flush()
            self._control.name_version(str(self._upload.version))
            self._control.resume()
        self._seconds["pause"] = time.monotonic() - self._paused_at
        wide = (name for name, info in self._upload.tensors.items() if info.dtype == torch.float32)
        self.receipt = EngineReceipt(
            engine=self.name,
            version=self._upload.version,
            channel=self._transport.kind,
            seconds=self._seconds,
            workers=(),
            rounded=tuple(sorted(name for name in wide if name.endswith(ROUNDED))),
        )
        self._done()

    def abort(self, error: BaseException) -> None:
        """End the push. The server stays paused and has no version, unless the push has not begun there."""
        if self._owner != threading.get_ident():
            return  # this push was refused because another one runs
        try:
            if self._flight is not None:
                with contextlib.suppress(TransferError):  # `error` says more
                    self._flight.wait()
            self.close()
            if self._begun:
                self._control.name_version(self._mark)
            elif self._paused:
                self._control.resume()
                logger.warning("%s continues with the version that it had", self.name)
        finally:
            self._done()

    def close(self) -> None:
        """Disconnect, and leave the server as it is."""
        transport, self._transport = self._transport, None
        try:
            if transport is not None:
                transport.close()
        except TransferError as error:
            logger.debug("%s has not left the group: %s", self.name, summary(error))

    def _done(self) -> None:
        if self._transport is not None:
            self._transport.release()
        self._buffer = self._flight = self._owner = None
        self._busy.release()

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self._seconds[what] = self._seconds.get(what, 0.0) + time.monotonic() - start
