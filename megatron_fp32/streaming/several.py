"""One push to several sinks: what one of them fails in does not stop the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_fp32.errors import summary
from megatron_fp32.streaming.sinks import EngineReceipt, Sink, Upload
from megatron_fp32.weights.fp8.scheme import Fp8Scheme

logger = logging.getLogger(__name__)


class SeveralSinks:
    """Gives every tensor to all sinks that have not failed; see `Sink`.

    Raises:
        TransferError: from the method in which the last sink fails.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        if not sinks:
            raise ValueError("expected one sink or more, got none")
        self._sinks = list(sinks)
        self.failed: dict[str, str] = {}
        """What the sinks have failed in, by their names."""

    def begin(self, upload: Upload) -> None:
        """See `Sink`."""
        self._each(lambda sink: sink.begin(upload))

    def write(self, name: str, tensor: Tensor) -> None:
        """See `Sink`."""
        self._each(lambda sink: sink.write(name, tensor))

    def finish(self) -> None:
        """See `Sink`."""
        self._each(lambda sink: sink.finish())

    def abort(self, error: BaseException) -> None:
        """See `Sink`. The sinks that have failed have heard of it."""
        for sink in self._sinks:
            self._abort(sink, error)
        self._sinks = []

    def scheme(self, device: torch.device) -> Fp8Scheme | None:
        """The FP8 format that all engines want.

        Raises:
            ValueError: when they want different ones.
        """
        schemes = {name_of(sink): engine_scheme(sink, device) for sink in self._sinks}
        first, *others = schemes.values()
        if any(other != first for other in others):
            raise ValueError(f"the engines want different FP8 formats: {schemes}. Push to them one after the other")
        return first

    @property
    def receipts(self) -> tuple[EngineReceipt, ...]:
        """Of the engines that have the version."""
        found = (getattr(sink, "receipt", None) for sink in self._sinks)
        return tuple(receipt for receipt in found if isinstance(receipt, EngineReceipt))

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:
                if len(self._sinks) == 1:
                    raise
                self.failed[name_of(sink)] = summary(error, 2000)
                self._sinks.remove(sink)
                logger.error("%s does not have the version: %s", name_of(sink), summary(error))
                self._abort(sink, error)

    def _abort(self, sink: Sink, error: BaseException) -> None:
        try:
            sink.abort(error)
        except Exception as another:
            error.add_note(f"{name_of(sink)} failed again when it heard of this: {summary(another)}")


def name_of(sink: Sink) -> str:
    """How messages call a sink."""
    return str(getattr(sink, "name", type(sink).__name__))


def engine_scheme(sink: Sink, device: torch.device) -> Fp8Scheme | None:
    """The FP8 format that the engine behind a sink wants.

    Raises:
        ValueError: for a sink without an engine.
    """
    ask = getattr(sink, "scheme", None)
    if ask is None:
        raise ValueError(f"fp8='like:engine' needs a sink that knows its engine, got {name_of(sink)}")
    found: Fp8Scheme | None = ask(device)
    return found
