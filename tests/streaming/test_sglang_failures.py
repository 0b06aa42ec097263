"""Pushes into a server with SGLang's routes that fail, are refused, or meet another push."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest
import torch

from megatron_fp32 import SGLangSink, TransferError, named_scheme
from tests.streaming.sglang_pushes import Tensors, held, odd, push, sink_of, upload
from tests.streaming.sglang_server import Server, serving


@pytest.mark.parametrize("fault", [400, 500, "load"])
@pytest.mark.parametrize("transport", ["distributed", "tensor"])
def test_an_update_that_fails_leaves_no_version_and_the_next_push_works(
    engine: tuple[str, Server], fault: int | str, transport: str
) -> None:
    url, server = engine
    sink, route = sink_of(url, transport=transport), f"/update_weights_from_{transport}"
    push(sink, odd(), 1)
    server.fail[route] = (2, fault)
    said = "Please discard the whole weights" if fault == "load" else f"answered {fault}.*injected fault of {route}"
    with pytest.raises(TransferError, match=said):
        push(sink, odd(1), 2)
    assert server.paused
    assert server.version.startswith("incomplete-")
    server.fail.clear()
    push(sink, odd(2), 3)
    assert (server.state()[0][0], server.version, server.paused) == (held(odd(2)), "3", False)


@pytest.mark.parametrize("transport", ["distributed", "tensor"])
def test_one_update_that_was_not_loaded_is_not_overlooked(engine: tuple[str, Server], transport: str) -> None:
    url, server = engine
    server.fail[f"/update_weights_from_{transport}"], server.once = (2, "load"), True
    with pytest.raises(TransferError, match="Please discard the whole weights"):
        push(sink_of(url, transport=transport), odd(), 1)
    assert server.version.startswith("incomplete-")
    assert len(server.state()[0][1]) == 3, "no bucket leaves after one that was not loaded"


@pytest.mark.parametrize("route", ["/end_weight_update", "/flush_cache", "/continue_generation"])
def test_a_push_that_fails_at_its_end_has_no_version(engine: tuple[str, Server], route: str) -> None:
    url, server = engine
    sink = sink_of(url)
    server.fail[route] = (0, 500)
    with pytest.raises(TransferError, match=f"{route} answered 500"):
        push(sink, odd(), 1)
    assert server.paused
    assert server.version.startswith("incomplete-")
    server.fail.clear()
    push(sink, odd(1), 2)
    assert (server.state()[0][0], server.version, server.paused) == (held(odd(1)), "2", False)


@pytest.mark.parametrize("stop", [0, 1, 20, 36])
def test_a_sender_that_fails_leaves_no_version_and_the_next_push_works(engine: tuple[str, Server], stop: int) -> None:
    url, server = engine
    sink = sink_of(url)
    with pytest.raises(ValueError, match="a weight is not finite"):
        push(sink, odd(), 1, stop=stop)
    assert server.paused
    assert server.version.startswith("incomplete-")
    assert "/destroy_weights_update_group" in server.routes
    assert "/end_weight_update" not in server.routes, "the session completes half of a model"
    push(sink, odd(1), 2)
    assert (server.state()[0][0], server.version, server.paused) == (held(odd(1)), "2", False)


def test_a_failed_server_that_refuses_the_next_push_stays_paused(engine: tuple[str, Server]) -> None:
    url, server = engine
    sink = sink_of(url)
    with pytest.raises(ValueError, match="not finite"):
        push(sink, odd(), 1, stop=20)
    for route in ("/init_weights_update_group", "/begin_weight_update"):
        server.fail = {route: (0, 500)}
        with pytest.raises(TransferError, match=f"{route} answered 500"):
            push(sink, odd(), 2)
        assert server.paused
        assert server.version.startswith("incomplete-")


@pytest.mark.parametrize("route", ["/init_weights_update_group", "/pause_generation", "/begin_weight_update"])
def test_a_server_that_refuses_before_anything_was_sent_goes_on(engine: tuple[str, Server], route: str) -> None:
    url, server = engine
    server.fail[route] = (0, 400)
    with pytest.raises(TransferError, match=f"injected fault of {route}"):
        push(sink_of(url), odd(), 1)
    assert (server.paused, server.version) == (False, "default")


def test_a_server_that_dies_ends_the_push_and_a_new_one_gets_it(tmp_path: Path) -> None:
    with serving(tmp_path / "first") as (url, server):
        sink = sink_of(url)
        server.fail["/update_weights_from_distributed"] = (2, "die")
        with pytest.raises(TransferError):
            push(sink, odd(), 1)
        assert server.version.startswith("incomplete-")
    with serving(tmp_path / "second") as (url, server):
        push(sink_of(url), odd(), 1)
        assert server.state()[0][0] == held(odd())


def test_a_second_push_is_refused_and_the_first_completes(engine: tuple[str, Server]) -> None:
    url, server = engine
    sink, tensors = sink_of(url), odd()
    sink.begin(upload(tensors, 1))
    names = list(tensors)
    for name in names[:20]:
        sink.write(name, tensors[name])
    errors: list[BaseException] = []

    def second(other: SGLangSink) -> None:
        try:
            push(other, odd(1), 2)
        except BaseException as error:
            errors.append(error)

    for other in (sink, sink_of(url)):
        thread = threading.Thread(target=second, args=(other,))
        thread.start()
        thread.join()
    assert "a sink takes one at a time" in str(errors[0])
    assert "the push of another trainer is not finished" in str(errors[1])
    assert server.routes.count("/pause_generation") == 1
    for name in names[20:]:
        sink.write(name, tensors[name])
    sink.finish()
    assert (server.state()[0][0], server.version, server.paused) == (held(tensors), "1", False)


def test_an_open_session_of_someone_else_is_left_alone(engine: tuple[str, Server]) -> None:
    """Someone whose version does not begin with "incomplete"."""
    url, server = engine
    server.post("/pause_generation", {"mode": "retract"})
    server.post("/begin_weight_update", {})
    with pytest.raises(TransferError, match=r"the push of another trainer is not finished.*already open"):
        push(sink_of(url), odd(), 1)
    assert (server.paused, server.version) == (True, "default")


def test_a_new_trainer_takes_over_where_it_is_told_to(engine: tuple[str, Server]) -> None:
    url, server = engine
    gone, tensors = sink_of(url), odd()
    gone.begin(upload(tensors, 1))
    for name in list(tensors)[:20]:
        gone.write(name, tensors[name])
    with pytest.raises(TransferError, match=r"pass SGLangOptions\(take_over=True\)"):
        push(sink_of(url), odd(1), 2)
    push(sink_of(url, take_over=True), odd(1), 2)
    assert (server.state()[0][0], server.version, server.paused) == (held(odd(1)), "2", False)


def test_a_version_without_sessions(tmp_path: Path) -> None:
    with serving(tmp_path / "server", sessions=False, version="0.5.17") as (url, server):
        sink = sink_of(url)
        push(sink, odd(), 1)
        assert (server.state()[0][0], server.version) == (held(odd()), "1")
        refused = sink_of(url)
        with pytest.raises(TransferError, match=r"has no /begin_weight_update.*0\.5\.23 has it") as caught:
            refused.begin(upload(odd(), 2, fp8=named_scheme("blockwise")))
        refused.abort(caught.value)
        assert (server.version, server.paused) == ("1", False)


@pytest.mark.parametrize("size", ["pp_size", "dp_size"])
def test_ranks_that_updates_do_not_reach_are_refused(tmp_path: Path, size: str) -> None:
    with (
        serving(tmp_path / "server", **{size: 2}) as (url, server),
        pytest.raises(TransferError, match=r"2 (pipeline|data) parallel ranks"),
    ):
        push(sink_of(url), odd(), 1)
    assert not server.log


def test_a_server_that_does_not_answer() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TransferError, match=f"{url}/model_info did not answer: timed out"):
            push(sink_of(url, timeout=0.5), odd(), 1)


def as_announced(sink: SGLangSink, tensors: Tensors) -> None:
    sink.begin(upload(odd(), 1))
    for name, tensor in tensors.items():
        sink.write(name, tensor)
    sink.finish()


@pytest.mark.parametrize("wrong", ["name", "dtype", "shape", "missing", "more"])
def test_tensors_that_were_not_announced_end_the_push(engine: tuple[str, Server], wrong: str) -> None:
    url, server = engine
    sink, tensors = sink_of(url), odd()
    first = tensors["0.weight"]
    sent = {
        "name": {"1.weight": first},
        "dtype": {"0.weight": first.view(torch.int8)},
        "shape": {"0.weight": first.t()},
        "missing": {name: tensor for name, tensor in tensors.items() if name != "large"},
        "more": tensors | {"another": first},
    }
    with pytest.raises(TransferError, match="1 of .* buckets were not sent" if wrong == "missing" else "expected") as e:
        as_announced(sink, sent[wrong])
    sink.abort(e.value)
    assert server.version.startswith("incomplete-")
