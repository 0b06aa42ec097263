"""The requests that steer a server of SGLang. The fields are those of its `managers/io_struct.py`."""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_fp32.errors import TransferError
from megatron_fp32.streaming.sglang_buckets import FlatBucket

FORMAT = "flattened_bucket"


class NoRouteError(TransferError):
    """The server does not have a route."""


class SGLangControl:
    """Steers a server of SGLang.

    Every method raises TransferError with what the server says, or when it does not answer in time.

    Args:
        url: of the server.
        timeout: seconds for a request.
        headers: of every request, such as an authorization.
    """

    def __init__(self, url: str, *, timeout: float, headers: Mapping[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._timeout, self._headers = timeout, dict(headers or {})

    def workers(self) -> int:
        """Number of tensor parallel ranks.

        Raises:
            TransferError: for pipeline or data parallel ranks, which SGLang's weight updates do not reach.
        """
        info = self._request("GET", "/server_info")
        for key, what in (("pp_size", "pipeline"), ("dp_size", "data")):
            if info.get(key, 1) != 1:
                raise TransferError(
                    f"{self.url} has {info[key]} {what} parallel ranks, and SGLang updates weights of 1 only: "
                    "start one server for each"
                )
        if not isinstance(info.get("tp_size"), int):
            raise TransferError(f"{self.url}/server_info does not say tp_size: is this a server of SGLang?")
        return int(info["tp_size"])

    def version(self) -> str | None:
        """The version that the server gives to its weights."""
        found = self._request("GET", "/model_info").get("weight_version")
        return None if found is None else str(found)

    def name_version(self, version: str) -> None:
        """Change that version."""
        self._request("POST", "/update_weight_version", {"new_version": version, "abort_all_requests": False})

    def pause(self, mode: str) -> None:
        """Answer no requests; `mode` ("abort", "retract" or "in_place") says what becomes of those that run."""
        self._request("POST", "/pause_generation", {"mode": mode})

    def resume(self) -> None:
        """Answer requests again."""
        self._request("POST", "/continue_generation", {})

    def begin(self) -> None:
        """Open a session of updates.

        Raises:
            NoRouteError: when this SGLang has no sessions, as 0.5.17.
        """
        self._request("POST", "/begin_weight_update", {})

    def end(self) -> None:
        """Close the session: the model is complete."""
        self._request("POST", "/end_weight_update", {})

    def join(self, group: str, backend: str, address: str, port: int, world_size: int) -> None:
        """Let every rank join the trainer, which is rank 0."""
        body = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": world_size}
        self._request("POST", "/init_weights_update_group", {**body, "group_name": group, "backend": backend})

    def leave(self, group: str) -> None:
        """Let every rank leave the trainer."""
        self._request("POST", "/destroy_weights_update_group", {"group_name": group})

    def receive(self, bucket: FlatBucket, group: str) -> None:
        """Receive a broadcast and load it; returns when all ranks have."""
        what = {"names": bucket.names, "dtypes": bucket.dtypes, "shapes": bucket.shapes, "group_name": group}
        self._request("POST", "/update_weights_from_distributed", {**what, "load_format": FORMAT, "flush_cache": False})

    def load(self, pickles: Sequence[bytes]) -> None:
        """Unpickle a bucket, one pickle for each rank, and load it; returns when all ranks have."""
        texts = [base64.b64encode(one).decode() for one in pickles]
        body = {"serialized_named_tensors": texts, "load_format": FORMAT, "flush_cache": False}
        self._request("POST", "/update_weights_from_tensor", body)

    def flush(self) -> None:
        """Forget the KV cache."""
        self._request("POST", f"/flush_cache?{urllib.parse.urlencode({'timeout': min(self._timeout, 30.0)})}")

    def _request(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        where = f"{self.url}{route.partition('?')[0]}"
        data = None if body is None else json.dumps(body).encode()
        headers = self._headers | ({} if data is None else {"Content-Type": "application/json"})
        request = urllib.request.Request(f"{self.url}{route}", data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            kind = NoRouteError if error.code == 404 else TransferError
            raise kind(f"{where} answered {error.code}: {said}") from error
        except (OSError, http.client.HTTPException) as error:
            raise TransferError(f"{where} did not answer: {error}") from error
        found = _json(text)
        if found.get("success") is False:
            raise TransferError(f"{where} has failed: {found.get('message')}")
        return found


def _json(text: bytes) -> dict[str, Any]:
    """An answer; nothing for one that is not an object, such as the text of /flush_cache."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
