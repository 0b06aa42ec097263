"""A server with SGLang's routes and fields, and ranks in processes of their own that hold tensors instead of a model.

Fields, answers, the group and the buckets are those of SGLang 0.5.23 (`managers/io_struct.py`,
`entrypoints/http_server.py`, `scheduler_components/weight_updater.py`, `weight_sync/tensor_bucket.py`,
`utils/common.py`), written down here, so that tests need no SGLang. Unlike SGLang, the server refuses fields that it
does not know.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import hashlib
import http.server
import io
import json
import multiprocessing
import pickle
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world, rendezvous

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])

COMMON = {"rid", "http_worker_ipc"}
UPDATE = {"flush_cache", "abort_all_requests", "weight_version", "load_format", "selector", "torch_empty_cache"}
FIELDS: dict[str, tuple[set[str], set[str]]] = {
    "/pause_generation": (set(), {"mode"}),
    "/continue_generation": (set(), {"torch_empty_cache"}),
    "/begin_weight_update": (set(), {"selector"}),
    "/end_weight_update": (set(), set()),
    "/update_weight_version": ({"new_version"}, {"abort_all_requests"}),
    "/init_weights_update_group": (
        {"master_address", "master_port", "rank_offset", "world_size"},
        {"group_name", "backend"},
    ),
    "/destroy_weights_update_group": (set(), {"group_name"}),
    "/update_weights_from_distributed": ({"names", "dtypes", "shapes"}, {"group_name"} | UPDATE),
    "/update_weights_from_tensor": ({"serialized_named_tensors"}, UPDATE),
    "/flush_cache": (set(), set()),
}
"""Fields that a request must have, and those that it may have."""

SESSIONS = {"/begin_weight_update", "/end_weight_update"}
UPDATES = {"/update_weights_from_distributed", "/update_weights_from_tensor"}

ALLOWED = {
    ("types", "SimpleNamespace"),
    ("torch", "Size"),
    ("torch", "Tensor"),
    ("torch.storage", "UntypedStorage"),
    *(
        ("torch.multiprocessing.reductions", name)
        for name in ("rebuild_tensor", "rebuild_typed_storage", "rebuild_storage_filename")
    ),
    *(("torch", name) for name in ("bfloat16", "float32", "float8_e4m3fn", "int8", "uint8")),
}
"""The part of the allowed names of SGLang's `SafeUnpickler` that a pickle of this package may use on a CPU."""


class SafeUnpickler(pickle.Unpickler):
    """SGLang's, with fewer names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        raise RuntimeError(f"Blocked unsafe global ({module}.{name}) during pickle deserialization")


def init_custom_process_group(backend: str, init_method: str, world_size: int, rank: int, group_name: str) -> Any:
    """SGLang's `utils/common.py`, with a shorter time-out."""
    timeout = datetime.timedelta(seconds=20)
    store, rank, world_size = next(rendezvous(init_method, rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    store = PrefixStore(group_name, store)
    group, _ = _new_process_group_helper(
        world_size, rank, [], Backend(backend), store, group_name=group_name, backend_options=None, timeout=timeout
    )
    _world.pg_group_ranks[group] = {i: i for i in range(world_size)}
    return group


def reconstruct(flattened: Tensor, metadata: list[tuple[str, Any, torch.dtype, int, int]]) -> list[tuple[str, Tensor]]:
    """SGLang's `FlattenedTensorBucket.reconstruct_tensors`."""
    return [(name, flattened[start:end].view(dtype).reshape(shape)) for name, shape, dtype, start, end in metadata]


def empty_bucket(
    names: list[str], dtypes: list[str], shapes: list[list[int]]
) -> tuple[Tensor, list[tuple[str, Any, torch.dtype, int, int]]]:
    """SGLang's `FlattenedTensorBucket.empty`."""
    metadata, offset = [], 0
    for name, text, sizes in zip(names, dtypes, shapes, strict=True):
        dtype, shape = getattr(torch, text), torch.Size(sizes)
        if offset % dtype.itemsize:
            raise ValueError(f"Unaligned received tensor {name}: byte offset {offset}, dtype {dtype}")
        size = shape.numel() * dtype.itemsize
        metadata.append((name, shape, dtype, offset, offset + size))
        offset += size
    if not metadata:
        raise ValueError("Cannot create empty tensor bucket")
    return torch.empty(offset, dtype=torch.uint8), metadata


class Rank:
    """One tensor parallel rank."""

    def __init__(self, rank: int) -> None:
        self._rank, self._session = rank, False
        self._groups: dict[str, Any] = {}
        self.held: dict[str, tuple[str, tuple[int, ...], str]] = {}
        self.calls: list[list[str]] = []

    def answer(self, route: str, body: dict[str, Any], *, sessions: bool) -> tuple[bool, str]:
        if route == "/init_weights_update_group":
            name = body["group_name"]
            self._groups[name] = init_custom_process_group(
                backend=body["backend"],
                init_method=f"tcp://{body['master_address']}:{body['master_port']}",
                world_size=body["world_size"],
                rank=body["rank_offset"] + self._rank,
                group_name=name,
            )
        elif route == "/destroy_weights_update_group":
            dist.destroy_process_group(self._groups.pop(body["group_name"]))
        elif route == "/begin_weight_update":
            if self._session:
                return False, "a weight-update session is already open; call end_weight_update() first"
            self._session = True
        elif route == "/end_weight_update":
            if not self._session:
                return False, "no weight-update session is open; call begin_weight_update() first"
            self._session = False
        elif sessions and not self._session:
            return False, f"{route[1:]} must run between begin_weight_update() and end_weight_update()"
        else:
            return self._update(route, body)
        return True, "Success"

    def _update(self, route: str, body: dict[str, Any]) -> tuple[bool, str]:
        assert body["load_format"] == "flattened_bucket"
        if route == "/update_weights_from_distributed":
            try:
                flattened, metadata = empty_bucket(body["names"], body["dtypes"], body["shapes"])
                dist.broadcast(flattened, src=0, group=self._groups[body["group_name"]])
            except Exception as error:
                return False, f"Failed to receive weights: {error}"
        else:
            data = base64.b64decode(body["serialized_named_tensors"][self._rank], validate=True)
            found = SafeUnpickler(io.BytesIO(data)).load()
            flattened = found["flattened_tensor"]
            metadata = [(one.name, one.shape, one.dtype, one.start_idx, one.end_idx) for one in found["metadata"]]
        self.calls.append([name for name, *_ in metadata])
        if body.get("_load_fails"):
            return False, "Failed to update parameter online: no such parameter. Please discard the whole weights."
        for name, tensor in reconstruct(flattened, metadata):
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            self.held[name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest())
        return True, "Success"


def run_rank(rank: int, size: int, directory: Path, pipe: Pipe) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(directory / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    state = Rank(rank)
    pipe.send("ready")
    while True:
        route, body, sessions = pipe.recv()
        if route == "state":
            pipe.send((state.held, state.calls))
            continue
        try:
            pipe.send(state.answer(route, body, sessions=sessions))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))


class Server:
    """What tests see of the server.

    `fail` has for a route how often it still works, and then the fault: a status with which the request is refused,
    "load" for an update whose tensors arrive and are not loaded, or "die". It stays; with `once`, the route works
    again.
    """

    def __init__(self, directory: Path, *, ranks: int = 1, sessions: bool = True, info: dict[str, Any]) -> None:
        self.version, self.paused, self.sessions = "default", False, sessions
        self.info = {"tp_size": ranks, "pp_size": 1, "dp_size": 1, "version": "0.5.23"} | info
        self.log: list[tuple[str, dict[str, Any]]] = []
        self.fail: dict[str, tuple[int, int | str]] = {}
        self.once = False
        self._lock = threading.Lock()
        self._pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(target=run_rank, args=(rank, ranks, directory, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self.processes.append(process)
        assert [pipe.recv() for pipe in self._pipes] == ["ready"] * ranks

    @property
    def routes(self) -> list[str]:
        return [route for route, _ in self.log]

    def state(self) -> list[tuple[dict[str, tuple[str, tuple[int, ...], str]], list[list[str]]]]:
        """Of every rank: what it holds, and the names of every update."""
        return self._ask("state", {})

    def _ask(self, route: str, body: dict[str, Any]) -> list[Any]:
        with self._lock:
            for pipe in self._pipes:
                pipe.send((route, body, self.sessions))
            return [pipe.recv() for pipe in self._pipes]

    def get(self, route: str) -> tuple[int, dict[str, Any]]:
        if route == "/server_info":
            return 200, self.info
        return (200, {"weight_version": self.version}) if route == "/model_info" else (404, {"detail": "Not Found"})

    def post(self, route: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        self.log.append((route, body))
        if route not in FIELDS or (route in SESSIONS and not self.sessions):
            return 404, {"detail": "Not Found"}
        needed, allowed = FIELDS[route]
        if not needed <= set(body) <= needed | allowed | COMMON:
            return 422, {"detail": f"fields of {route}: {sorted(body)}"}
        left, fault = self.fail.get(route, (1, ""))
        if route in self.fail:
            self.fail[route] = (left - 1, fault)
        if left <= 0:
            if self.once:
                del self.fail[route]
            if fault == "die":
                for process in self.processes:
                    process.kill()
                    process.join()
            elif fault == "load":
                body = body | {"_load_fails": True}
            else:
                return int(fault), {"success": False, "message": f"injected fault of {route}"}
        return self._do(route, body)

    def _do(self, route: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if route in UPDATES:
            assert self.paused, "an update of a server that answers requests"
        if route == "/pause_generation":
            assert body["mode"] in ("abort", "retract", "in_place")
            self.paused = True
        elif route == "/continue_generation":
            self.paused = False
        elif route == "/update_weight_version":
            self.version = body["new_version"]
        elif route != "/flush_cache":
            answers = self._ask(route, body)
            success = all(good for good, _ in answers)
            return 200 if success else 400, {"success": success, "message": " | ".join(text for _, text in answers)}
        return 200, {"success": True, "message": "ok"}


@contextlib.contextmanager
def serving(directory: Path, *, ranks: int = 1, sessions: bool = True, **info: Any) -> Iterator[tuple[str, Server]]:
    """(URL, server) on the loopback address."""
    directory.mkdir(exist_ok=True)
    server = Server(directory, ranks=ranks, sessions=sessions, info=info)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(*server.get(self.path))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                status, answer = server.post(self.path.partition("?")[0], json.loads(body) if body else {})
            except (EOFError, OSError):  # a rank is gone, and SGLang with it
                self.close_connection = True
                return
            except AssertionError as error:
                status, answer = 500, {"detail": str(error)}
            self._answer(status, answer)

        def _answer(self, status: int, answer: dict[str, Any]) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}", server
        finally:
            listening.shutdown()
            for process in server.processes:
                process.kill()
                process.join()
