"""The requests that steer an engine of vLLM: over HTTP, or to an `LLM` object of this process."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megatron_fp32.errors import TransferError


class Control(Protocol):
    """What a sink asks of an engine."""

    @property
    def name(self) -> str:
        """How messages call the engine."""

    @property
    def url(self) -> str | None:
        """Of its server; None for an engine in this process."""

    def workers(self) -> int:
        """Number of workers, over tensor, pipeline and data parallel ranks."""

    def invite(self, info: Mapping[str, Any]) -> None:
        """Let every worker join the trainer."""

    def is_paused(self) -> bool:
        """Whether the engine answers no requests."""

    def pause(self, mode: str) -> None:
        """Answer no requests; `mode` says what becomes of those that run."""

    def resume(self) -> None:
        """Answer requests again."""

    def start(self) -> None:
        """Begin an update."""

    def update(self, info: Mapping[str, Any]) -> None:
        """Receive a push; returns when all workers have loaded it."""

    def finish(self, version: str) -> None:
        """End an update, whose weights have this version."""

    def version(self) -> str | None:
        """The version that answers carry; None where the engine knows no versions."""

    def name_version(self, version: str) -> None:
        """Change the version that answers carry, where the engine knows versions."""

    def reset_caches(self, *, running: bool) -> None:
        """Forget the KV of prefixes; with `running`, also that of requests that run, which is then computed again."""

    def wake(self, tag: str) -> None:
        """Bring memory back that was given up for sleep: "weights" or "kv_cache"."""


class HttpControl:
    """Steers an engine over the routes that `VLLM_SERVER_DEV_MODE=1` opens.

    Args:
        url: of the server.
        timeout: seconds for a request that moves no weights.
        headers: of every request, such as an authorization.
    """

    def __init__(self, url: str, *, timeout: float, headers: Mapping[str, str] | None = None) -> None:
        self.name = self.url = url.rstrip("/")
        self._timeout, self._headers = timeout, dict(headers or {})
        self._knows_versions = True

    def workers(self) -> int:
        """See `Control`."""
        return int(self._request("GET", "/get_world_size")["world_size"])

    def invite(self, info: Mapping[str, Any]) -> None:
        """See `Control`."""
        self._request("POST", "/init_weight_transfer_engine", {"init_info": info})

    def is_paused(self) -> bool:
        """See `Control`."""
        return self._request("GET", "/is_paused").get("is_paused") is True

    def pause(self, mode: str) -> None:
        """See `Control`."""
        self._request("POST", f"/pause?{urllib.parse.urlencode({'mode': mode, 'clear_cache': 'false'})}")

    def resume(self) -> None:
        """See `Control`."""
        self._request("POST", "/resume")

    def start(self) -> None:
        """See `Control`."""
        self._request("POST", "/start_weight_update")

    def update(self, info: Mapping[str, Any]) -> None:
        """See `Control`. The transfer keeps its own time-outs."""
        self._request("POST", "/update_weights", {"update_info": info}, timeout=None)

    def finish(self, version: str) -> None:
        """See `Control`."""
        self._request("POST", "/finish_weight_update", {"weight_version": version})

    def version(self) -> str | None:
        """See `Control`. vLLM 0.26 does not know versions."""
        try:
            return str(self._request("GET", "/weight_info")["weight_version"]) if self._knows_versions else None
        except _NotFoundError:
            self._knows_versions = False
            return None

    def name_version(self, version: str) -> None:
        """See `Control`. vLLM 0.26 does not know versions."""
        if not self._knows_versions:
            return
        try:
            self._request("POST", "/update_weight_version", {"new_version": version})
        except _NotFoundError:
            self._knows_versions = False

    def reset_caches(self, *, running: bool) -> None:
        """See `Control`."""
        answer = self._request("POST", f"/reset_prefix_cache?reset_running_requests={str(running).lower()}")
        if answer.get("success") is False:
            raise TransferError(f"{self.url} has not reset its prefix cache, because blocks of it are in use")

    def wake(self, tag: str) -> None:
        """See `Control`."""
        self._request("POST", f"/wake_up?{urllib.parse.urlencode({'tags': tag})}")

    def _request(
        self, method: str, route: str, body: Mapping[str, Any] | None = None, *, timeout: float | None = -1.0
    ) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if data is None else {"Content-Type": "application/json"})
        request = urllib.request.Request(f"{self.url}{route}", data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout if timeout == -1.0 else timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            kind = _NotFoundError if error.code == 404 else TransferError
            hint = "; start the server with VLLM_SERVER_DEV_MODE=1" if error.code == 404 else ""
            raise kind(f"{self.url}{route} answered {error.code}: {said}{hint}") from error
        except OSError as error:
            raise TransferError(f"{self.url}{route} did not answer: {error}") from error
        found = json.loads(text) if text.strip() else {}
        return found if isinstance(found, dict) else {}


class _NotFoundError(TransferError):
    """The engine does not have a route."""


class LlmControl:
    """Steers an `LLM` of this process, whose workers may be other processes.

    Nothing is paused: `generate` and a push are calls of one program.
    """

    url: str | None = None

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.name = f"LLM of {llm.llm_engine.vllm_config.model_config.model}"

    def workers(self) -> int:
        """See `Control`."""
        return int(self._llm.llm_engine.vllm_config.parallel_config.world_size_across_dp)

    def invite(self, info: Mapping[str, Any]) -> None:
        """See `Control`."""
        self._llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": dict(info)})

    def is_paused(self) -> bool:
        """See `Control`."""
        return False

    def pause(self, mode: str) -> None:
        """Nothing to do."""

    def resume(self) -> None:
        """Nothing to do."""

    def start(self) -> None:
        """See `Control`."""
        self._llm.collective_rpc("start_weight_update")

    def update(self, info: Mapping[str, Any]) -> None:
        """See `Control`."""
        self._llm.collective_rpc("update_weights", kwargs={"update_info": dict(info)})

    def finish(self, version: str) -> None:
        """See `Control`."""
        self._llm.collective_rpc("finish_weight_update")
        self.name_version(version)

    def version(self) -> str | None:
        """See `Control`. vLLM 0.26 does not know versions."""
        if hasattr(self._llm.llm_engine, "get_weight_version"):
            return str(self._llm.llm_engine.get_weight_version())
        return None

    def name_version(self, version: str) -> None:
        """See `Control`. vLLM 0.26 does not know versions."""
        if hasattr(self._llm.llm_engine, "set_weight_version"):
            self._llm.llm_engine.set_weight_version(version)

    def reset_caches(self, *, running: bool) -> None:
        """See `Control`."""
        self._llm.reset_prefix_cache()

    def wake(self, tag: str) -> None:
        """See `Control`."""
        self._llm.wake_up(tags=[tag])


class Call:
    """A request that runs beside the sending of weights, in a thread."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise what the request has failed with, as soon as it has."""
        if not self._thread.is_alive() and self._error is not None:
            raise TransferError(str(self._error)) from self._error

    def join(self, timeout: float) -> None:
        """Wait for the end of the request, and raise what it has failed with.

        Raises:
            TransferError: also after the time-out.
        """
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TransferError(f"the engine has not answered for {timeout:g} s")
        self.check()
