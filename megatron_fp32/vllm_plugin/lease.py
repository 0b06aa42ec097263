"""What an engine does when the trainer that has paused it is gone.

A paused engine answers nobody. Its pause was set over HTTP, so it would stay for ever.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
import urllib.request

from megatron_fp32.errors import TransferError
from megatron_fp32.transfer.rendezvous import Invitation, Messages, join_store

logger = logging.getLogger(__name__)


class Lease:
    """Watches the heartbeat of a trainer.

    When the trainer has been gone for `seconds` and has left the engine paused: an engine whose model was not touched
    continues with the version that it has. An engine with half of a model ends, because it has no version to serve, and
    whoever starts engines starts it again.

    Args:
        invitation: of the trainer.
        seconds: 0 to only look at the heartbeat on request.
        url: of the engine; None in workers that do not act.
        version: of the weights that the engine has, which an engine that continues names again.
        half: whether the model holds a part of a push that has failed.
        before: of the trainer before this one, which may have left the engine paused.
    """

    def __init__(
        self,
        invitation: Invitation,
        *,
        seconds: float,
        url: str | None,
        version: str,
        half: bool,
        before: Lease | None,
    ) -> None:
        self._seconds, self._url = seconds, url
        self._messages = Messages(join_store(invitation), invitation.secret)
        self._ended = threading.Event()
        self._reading = threading.Lock()
        self._paused = False
        self._left_paused = before is not None and before.holds
        self.version, self.half = version, half
        if seconds > 0 and url is not None:
            threading.Thread(target=self._watch, name="megatron_fp32 lease", daemon=True).start()

    def trainer_lives(self, wait: float = 3.0) -> bool:
        """Whether the trainer's heart beats: takes up to `wait` seconds."""
        try:
            first = self._messages.count("beat")
            end = time.monotonic() + wait
            while time.monotonic() < end:
                if self._messages.count("beat") != first:
                    return True
                time.sleep(0.1)
        except RuntimeError:
            return False
        return False

    @property
    def holds(self) -> bool:
        """Whether a trainer, this one or one before it, keeps the engine from answering."""
        return self._paused or self._left_paused or self.half

    def complete(self, version: str) -> None:
        """The engine has the whole of a push."""
        self._left_paused, self.half, self.version = False, False, version

    def begin(self) -> None:
        """A push begins, and pauses the engine. The store may be gone before the watch reads this there."""
        with self._reading:
            self._paused = True

    def end(self) -> None:
        """Stop watching."""
        self._ended.set()

    def _watch(self) -> None:
        last, since = -1, time.monotonic()
        while not self._ended.wait(min(1.0, self._seconds / 4)):
            with self._reading:
                try:
                    beat = self._messages.count("beat")
                    self._paused = self._messages.count("paused") > 0
                except (RuntimeError, TransferError):
                    beat = last  # the store is gone, and with it the trainer
            if beat != last:
                last, since = beat, time.monotonic()
            elif not self.holds:
                since = time.monotonic()
            elif time.monotonic() - since > self._seconds:
                self._act()
                return

    def _act(self) -> None:
        if self.half:
            logger.error(
                "the trainer has been gone for %g s and has left half of a model: this engine ends", self._seconds
            )
            os.kill(os.getpid(), signal.SIGTERM)
            return
        logger.warning("the trainer has been gone for %g s: this engine continues as it was", self._seconds)
        with contextlib.suppress(OSError):  # vLLM 0.26 does not know versions
            self._post("/update_weight_version", {"new_version": self.version})
        try:
            self._post("/resume")
        except OSError as error:
            logger.error("%s/resume failed, and this engine stays paused: %s", self._url, error)

    def _post(self, route: str, body: dict[str, str] | None = None) -> None:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._url}{route}", data=data, headers={"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=self._seconds):
            pass
