"""vLLM's OpenAI server as a child process, and its routes as methods."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv" / "engine"
PYTHON = os.environ.get("ENGINE_PYTHON", str(ENVIRONMENT / "bin" / "python"))
"""The interpreter that has vLLM. On a machine with a GPU it may be the trainer's own."""

FP32_HEAD = ("--hf-overrides", json.dumps({"head_dtype": "float32"}))
"""Flags with which vLLM computes logits in fp32."""

VISIBLE_WEIGHTS = "tests.engine.visible_weights:register"
BLOCK_FP8 = "tests.engine.block_fp8_kernel:register"

_EMPTY = hashlib.sha256(b"").hexdigest()


class EngineError(RuntimeError):
    """The server ended, did not start in time, or answered with an error."""


class EngineServer:
    """A server of one model; inside `with` it runs.

    Each rank computes in one thread, so that sums do not depend on the number of cores.

    Args:
        model: directory of a Hugging Face checkpoint. It needs no tokenizer.
        tensor_parallel: number of ranks.
        flags: more flags of `vllm serve`, such as `FP32_HEAD`.
        environment: more environment variables.
        plugins: functions, as `module:name`, that vLLM calls in each of its processes before it builds a model. Modules
            of this repository can be imported there.
        timeout: seconds that the start may take, and that a request may take.

    Raises:
        FileNotFoundError: the environment of the engine is not there.
        EngineError: the server ended or was not ready in time. The message has the end of its log.
    """

    def __init__(
        self,
        model: Path,
        *,
        tensor_parallel: int = 1,
        flags: Sequence[str] = FP32_HEAD,
        environment: Mapping[str, str] | None = None,
        plugins: Sequence[str] = (VISIBLE_WEIGHTS,),
        timeout: float = 180.0,
    ) -> None:
        self.model, self.tensor_parallel, self.timeout = model, tensor_parallel, timeout
        self.flags, self.plugins, self.environment = list(flags), list(plugins), dict(environment or {})
        self.seconds_to_start = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = contextlib.ExitStack()
        self._url = ""

    def __enter__(self) -> Self:
        if not Path(PYTHON).exists():
            raise FileNotFoundError(f"{PYTHON} does not exist: `make test-engine` builds the environment of the engine")
        with contextlib.ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engine-")))
            self._write_plugins(directory)
            self.log = directory / "log.txt"
            port = _free_port()
            self._url = f"http://127.0.0.1:{port}"
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [PYTHON, "-m", "vllm.entrypoints.openai.api_server", *self._arguments(port)],
                    cwd=directory, env=self._variables(directory), stdin=subprocess.DEVNULL, stdout=log,
                    stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            stack.callback(self._kill)
            self._wait_until_ready()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def url(self) -> str:
        """Where the server listens."""
        return self._url

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of all tokens but the first, each given the tokens before it. The floats are the engine's fp32."""
        answer = self._complete(token_ids, max_tokens=1, prompt_logprobs=0)
        rows = answer["prompt_logprobs"][1:]
        return [row[str(token)]["logprob"] for row, token in zip(rows, token_ids[1:], strict=True)]

    def generate(self, token_ids: Sequence[int], n: int) -> list[int]:
        """The n most likely tokens after these, one after another."""
        tokens: list[int] = self._complete(token_ids, max_tokens=n, ignore_eos=True)["token_ids"]
        return tokens

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every parameter, as the engine holds it. A name begins with the rank: `dp0:pp0:pcp0:tp1:model...`.

        Raises:
            EngineError: the engine holds a parameter elsewhere, so that its checksum says nothing.
        """
        sums: dict[str, str] = self.post("/weight_checker", {"action": "checksum"})["checksums"]
        if empty := sorted(name for name, digest in sums.items() if digest == _EMPTY):
            raise EngineError(f"The engine holds {len(empty)} parameters as empty tensors, the first is {empty[0]}")
        return sums

    def weight_info(self) -> dict[str, Any]:
        """What the engine says of its weights: `{"weight_version": ...}`."""
        info: dict[str, Any] = self.get("/weight_info")
        return info

    def get(self, route: str) -> Any:
        """The answer to GET, without its JSON."""
        return self._request(urllib.request.Request(self._url + route))

    def post(self, route: str, body: Mapping[str, Any] | None = None) -> Any:
        """The answer to POST, without its JSON."""
        data = json.dumps(body or {}).encode()
        return self._request(urllib.request.Request(self._url + route, data, {"Content-Type": "application/json"}))

    def end_of_log(self, lines: int = 40) -> str:
        """The last lines of what the server printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def _complete(self, token_ids: Sequence[int], **fields: Any) -> Any:
        body = {"model": "model", "prompt": list(token_ids), "temperature": 0, "return_token_ids": True, **fields}
        return self.post("/v1/completions", body)["choices"][0]

    def _request(self, request: urllib.request.Request) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise EngineError(
                f"{request.get_method()} {request.selector} answered {error.code}: {error.read().decode()}\n"
                f"The server's log ends with\n{self.end_of_log()}"
            ) from error
        except OSError as error:
            raise EngineError(f"No answer to {request.selector}: {error}\n{self.end_of_log()}") from error
        return json.loads(text) if text else None

    def _arguments(self, port: int) -> list[str]:
        return [
            *("--host", "127.0.0.1", "--port", str(port), "--model", str(self.model.resolve())),
            *("--served-model-name", "model", "--skip-tokenizer-init", "--dtype", "bfloat16", "--enforce-eager"),
            *("--max-model-len", "256", "--max-num-seqs", "4", "--max-num-batched-tokens", "256"),
            # A cached prefix would have log-probs of the weights before an update.
            *("--no-enable-prefix-caching", "--tensor-parallel-size", str(self.tensor_parallel), *self.flags),
        ]

    def _variables(self, directory: Path) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [*map(str, (Path(__file__).parent / "site", directory, ROOT)), os.environ.get("PYTHONPATH", "")]
            ),
            "VLLM_SERVER_DEV_MODE": "1",  # the routes that change weights
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(cores[i % len(cores)]) for i in range(self.tensor_parallel)),
            "VLLM_CACHE_ROOT": str(ENVIRONMENT / "cache"),
            "VLLM_NO_USAGE_STATS": "1",
            "TORCHDYNAMO_DISABLE": "1",  # with it the first request takes 20 seconds
            "HF_HUB_OFFLINE": "1",
            **self.environment,
        }

    def _write_plugins(self, directory: Path) -> None:
        # vLLM finds plugins among the entry points of what is installed, and PYTHONPATH counts as that.
        metadata = directory / "engine_plugins-0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: engine-plugins\nVersion: 0\n")
        lines = [f"plugin{i} = {function}" for i, function in enumerate(self.plugins)]
        (metadata / "entry_points.txt").write_text("\n".join(["[vllm.general_plugins]", *lines, ""]))

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        start = time.monotonic()
        while True:
            self.seconds_to_start = time.monotonic() - start
            if self._process.poll() is not None:
                raise EngineError(f"The server ended with {self._process.returncode}:\n{self.end_of_log()}")
            if self.seconds_to_start > self.timeout:
                raise EngineError(f"The server was not ready after {self.timeout:.0f} s:\n{self.end_of_log()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self._url}/health", timeout=5):
                return
            time.sleep(0.1)

    def _kill(self) -> None:
        """End the server and the processes that it started."""
        assert self._process is not None
        group = self._process.pid  # the server leads a session
        shared = _shared_memory(group)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(group, signal.SIGTERM)  # vLLM then frees its shared memory
            end = time.monotonic() + 15
            while time.monotonic() < end:
                self._process.poll()  # a child that nobody waited for still counts as alive
                os.killpg(group, 0)
                time.sleep(0.05)
            os.killpg(group, signal.SIGKILL)
        self._process.wait()
        for path in shared:
            path.unlink(missing_ok=True)


def _shared_memory(session: int) -> set[Path]:
    """Files of shared memory that ranks of a session have open. vLLM 0.32 leaves those of tensor parallelism behind."""
    found: set[Path] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process ended, or belongs to another user
            if os.getsid(int(maps.parent.name)) == session:
                found |= {
                    Path(f"/dev/shm/{name}") for name in re.findall(r"/dev/shm/(vllm_dist_\S+)", maps.read_text())
                }
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
