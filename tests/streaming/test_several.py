"""One push to several sinks, and what a sink of an engine refuses before it does anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.errors import TransferError
from megatron_fp32.streaming import EngineReceipt, VllmOptions, VllmSink
from megatron_fp32.streaming.several import SeveralSinks, engine_scheme
from megatron_fp32.streaming.vllm import address_towards
from megatron_fp32.weights.fp8.scheme import named_scheme


class Noted:
    """Notes its calls, and fails in the one that it is told."""

    def __init__(self, name: str, *, fails_in: str | None = None, scheme: Any = None) -> None:
        self.name, self.calls, self._fails_in, self._scheme = name, [], fails_in, scheme
        self.receipt: EngineReceipt | None = None

    def scheme(self, device: torch.device) -> Any:
        return self._scheme

    def begin(self, upload: Any) -> None:
        self._note("begin")

    def write(self, name: str, tensor: Tensor) -> None:
        self._note(f"write {name}")

    def finish(self) -> None:
        self._note("finish")
        self.receipt = EngineReceipt(engine=self.name, version=1, channel="gloo", seconds={}, workers=(), rounded=())

    def abort(self, error: BaseException) -> None:
        self.calls.append(f"abort: {error}")

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self._fails_in:
            raise TransferError(f"{self.name} is gone")


def push(sinks: SeveralSinks) -> None:
    upload: Any = None
    sinks.begin(upload)
    sinks.write("a", torch.zeros(1))
    sinks.write("b", torch.zeros(1))
    sinks.finish()


@pytest.mark.parametrize("moment", ["begin", "write a", "write b", "finish"])
def test_the_others_go_on_when_one_fails(moment: str) -> None:
    first, second = Noted("first"), Noted("second", fails_in=moment)
    sinks = SeveralSinks([second, first])
    push(sinks)
    assert first.calls == ["begin", "write a", "write b", "finish"]
    assert second.calls[-2:] == [moment, "abort: second is gone"]
    assert sinks.failed == {"second": "TransferError: second is gone"}
    assert [receipt.engine for receipt in sinks.receipts] == ["first"]


def test_a_push_whose_sinks_all_fail_raises() -> None:
    sinks = SeveralSinks([Noted("first", fails_in="begin"), Noted("second", fails_in="write b")])
    with pytest.raises(TransferError, match="second is gone"):
        push(sinks)


def test_no_sink_is_refused() -> None:
    with pytest.raises(ValueError, match="expected one sink or more, got none"):
        SeveralSinks([])


def test_engines_that_want_different_formats_are_refused() -> None:
    device = torch.device("cpu")
    scheme = named_scheme("channelwise")
    assert SeveralSinks([Noted("a", scheme=scheme), Noted("b", scheme=scheme)]).scheme(device) == scheme
    with pytest.raises(ValueError, match="the engines want different FP8 formats"):
        SeveralSinks([Noted("a", scheme=scheme), Noted("b")]).scheme(device)
    with pytest.raises(ValueError, match="needs a sink that knows its engine"):
        engine_scheme(object(), device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel": "tcp"}, "channel"),
        ({"in_flight": "drop"}, "in_flight"),
        ({"prefix_cache": True}, "prefix_cache"),
        ({"stage": "disk"}, "stage"),
        ({"bucket_bytes": 0}, "bucket_bytes"),
        ({"sha256": 1}, "sha256"),
        ({"wake": "yes"}, "wake"),
        ({"timeout": -1}, "timeout must be a number of seconds"),
        ({"lease": "600"}, "lease must be a number of seconds"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        VllmOptions(**options)


def test_an_engine_is_a_url_or_an_llm(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="engine must be a URL such as http://host:8000, got 'host:8000'"):
        VllmSink("host:8000")
    with pytest.raises(TypeError, match="engine must be a URL or an LLM, got PosixPath"):
        VllmSink(tmp_path)


def test_a_sink_without_its_engine_says_so() -> None:
    sink = VllmSink("http://127.0.0.1:9", options=VllmOptions(timeout=5))
    with pytest.raises(TransferError, match=r"http://127\.0\.0\.1:9/get_world_size did not answer"):
        sink.scheme(torch.device("cpu"))


def test_an_engine_on_this_machine_is_reached_over_the_loopback_address() -> None:
    assert address_towards("http://localhost:8000") == address_towards("http://127.0.0.1:1") == "127.0.0.1"
    assert address_towards(None) == "127.0.0.1"
