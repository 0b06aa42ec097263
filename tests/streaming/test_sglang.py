"""Pushes into a server with SGLang's routes, fields and buckets; see tests/streaming/sglang_server.py."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_fp32 import SGLangOptions, SGLangSink, export_checkpoint, named_scheme
from megatron_fp32.streaming import StreamError, WeightStreamer
from megatron_fp32.streaming.sglang_buckets import plan_flat_buckets
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.weights.tensors import info_of
from tests.checkpoint.layouts import Layout, on_ranks
from tests.conftest import Families
from tests.families import case
from tests.streaming.live_models import apart, expected, live
from tests.streaming.sglang_pushes import OPTIONS, Held, held, odd, push, sink_of, upload
from tests.streaming.sglang_server import Server, serving

Ranks = Callable[[int], RankPool]


def test_unaligned_sizes_arrive_with_every_byte(engine: tuple[str, Server]) -> None:
    url, server = engine
    sink, tensors = sink_of(url), odd()
    push(sink, tensors, 3)
    state, calls = server.state()[0]
    assert state == held(tensors)
    assert (server.version, server.paused) == ("3", False)
    assert sink.receipt is not None
    assert (sink.receipt.version, sink.receipt.channel, sink.receipt.engine) == (3, "gloo", url)
    assert len(calls) > 3, "several buckets"
    assert sorted(name for call in calls for name in call) == sorted(tensors)


def test_the_order_of_the_requests(engine: tuple[str, Server]) -> None:
    url, server = engine
    sink = sink_of(url)
    for version in (1, 2):
        server.log.clear()
        push(sink, odd(version), version)
        routes = [route for route in server.routes if route != "/update_weights_from_distributed"]
        assert routes == [
            *(["/init_weights_update_group"] if version == 1 else []),
            "/pause_generation",
            "/begin_weight_update",
            "/update_weight_version",
            "/end_weight_update",
            "/flush_cache",
            "/update_weight_version",
            "/continue_generation",
        ]
        named = [body["new_version"] for route, body in server.log if route == "/update_weight_version"]
        assert re.fullmatch(r"incomplete-[0-9a-f]{8}", named[0])
        assert named[1:] == [str(version)]
        for route, body in server.log:
            if route == "/update_weight_version":
                assert body["abort_all_requests"] is False
            if route == "/update_weights_from_distributed":
                assert body["flush_cache"] is False
                assert "weight_version" not in body
        assert server.state()[0][0] == held(odd(version))


@pytest.mark.parametrize(
    ("options", "mode", "flushes"),
    [
        ({}, "retract", True),
        ({"in_flight": "abort"}, "abort", True),
        ({"in_flight": "abort", "prefix_cache": "keep"}, "abort", False),
        ({"in_flight": "keep", "prefix_cache": "keep"}, "in_place", False),
    ],
)
def test_requests_and_caches(engine: tuple[str, Server], options: dict[str, Any], mode: str, flushes: bool) -> None:
    url, server = engine
    push(sink_of(url, **options), odd(), 1)
    assert [body for route, body in server.log if route == "/pause_generation"] == [{"mode": mode}]
    assert ("/flush_cache" in server.routes) is flushes


def test_two_ranks_get_the_same(tmp_path: Path) -> None:
    with serving(tmp_path / "server", ranks=2) as (url, server):
        push(sink_of(url), odd(), 1)
        assert [state for state, _ in server.state()] == [held(odd())] * 2


def test_pickles_hold_the_same_tensors(tmp_path: Path) -> None:
    with serving(tmp_path / "server", ranks=2) as (url, server):
        sink = sink_of(url, transport="tensor")
        push(sink, odd(), 1)
        push(sink, odd(1), 2)
        assert [state for state, _ in server.state()] == [held(odd(1))] * 2
        assert "/init_weights_update_group" not in server.routes
        assert sink.receipt is not None
        assert sink.receipt.channel == "ipc"


@pytest.mark.parametrize("transport", ["distributed", "tensor"])
def test_the_trainer_holds_two_buckets(engine: tuple[str, Server], transport: str) -> None:
    url, _ = engine
    sink, tensors = sink_of(url, transport=transport), odd()
    sink.begin(upload(tensors, 1))
    seen: list[StorageWeakRef] = []
    most, transport_of = 0, sink._transport
    assert transport_of is not None
    make = transport_of.buffer

    def counted(nbytes: int) -> Tensor:
        buffer = make(nbytes)
        if all(ref.cdata != buffer.untyped_storage()._cdata for ref in seen if not ref.expired()):
            seen.append(StorageWeakRef(buffer.untyped_storage()))
        return buffer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transport_of, "buffer", counted)
        for name, tensor in tensors.items():
            sink.write(name, tensor)
            most = max(most, sum(not ref.expired() for ref in seen))
        sink.finish()
    gc.collect()
    assert most == 2
    assert not [ref for ref in seen if not ref.expired()]


def test_a_push_listens_on_one_address(engine: tuple[str, Server]) -> None:
    url, server = engine
    before = listening()
    sink = SGLangSink(url, options=SGLangOptions(**OPTIONS), listen="127.0.0.2")
    push(sink, odd(), 1)
    body = next(body for route, body in server.log if route == "/init_weights_update_group")
    assert body["master_address"] == "127.0.0.2"
    opened = listening() - before
    assert ("0200007F", body["master_port"]) in opened, "in /proc/net/tcp, least byte first"
    assert {address for address, _ in opened} == {"0200007F"}
    sink.close()
    with pytest.raises(ValueError, match="listen must be an address of this machine"):
        push(SGLangSink(url, listen="203.0.113.1"), odd(), 2)


def listening() -> set[tuple[str, int]]:
    """Addresses and ports on which this process listens."""
    mine = {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                address, _, port = fields[1].rpartition(":")
                found.add((address, int(port, 16)))
    return found


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from([torch.int8, torch.bfloat16, torch.float32, torch.float64]), st.integers(0, 40)),
        min_size=1,
        max_size=30,
    ),
    bucket_bytes=st.integers(1, 400),
)
def test_every_plan_is_readable_without_padding(sizes: list[tuple[torch.dtype, int]], bucket_bytes: int) -> None:
    infos = {str(at): info_of(dtype, [size]) for at, (dtype, size) in enumerate(sizes)}
    names: list[str] = []
    for bucket in plan_flat_buckets(infos, bucket_bytes):
        end = 0
        for place in bucket.places:
            assert place.start == end
            assert place.start % place.info.dtype.itemsize == 0
            end += place.info.nbytes
        assert end == bucket.nbytes
        assert end <= bucket_bytes or len([p for p in bucket.places if p.info.nbytes]) == 1
        names += sorted(bucket.names, key=int)
    assert names == list(infos)


def test_aligned_tensors_keep_their_order() -> None:
    infos = {"a": info_of(torch.bfloat16, [2]), "b": info_of(torch.float32, [1]), "c": info_of(torch.bfloat16, [1])}
    assert [bucket.names for bucket in plan_flat_buckets(infos, 100)] == [["a", "b", "c"]]
    infos["a"] = info_of(torch.bfloat16, [1])
    assert [bucket.names for bucket in plan_flat_buckets(infos, 100)] == [["b", "a", "c"]]


def from_a_model(hf: Path, imported: Path, url: str, *, layout: Layout, mtp: bool, fp8: str | None) -> Any:
    chunks = live(hf, imported, layout, mtp=mtp, train=False)
    streamer = WeightStreamer(chunks, source=imported, fp8=fp8)
    sink = SGLangSink(url, options=SGLangOptions(timeout=30, bucket_bytes=10_000))
    if fp8 is not None:  # a weight that cannot be quantized ends a first push in its middle
        weight = chunks[0].decoder.layers[-1].mlp.linear_fc2.weight
        kept = weight.detach()[0, 0].clone()
        weight.data[0, 0] = torch.inf
        with pytest.raises(ValueError if streamer.is_sender else StreamError, match=r"down_proj\.weight"):
            streamer.push(sink, version=1)
        weight.data[0, 0] = kept
    receipt = streamer.push(sink, version=2)
    return receipt.engines[0].rounded


@pytest.mark.parametrize(
    ("name", "fp8"),
    [("Qwen3", None), ("Qwen3", "blockwise"), ("Qwen3.5-MoE", None), ("Qwen3.5", "blockwise")],
)
def test_a_live_model_arrives_as_its_source(
    ranks: Ranks, families: Families, engine: tuple[str, Server], tmp_path: Path, name: str, fp8: str | None
) -> None:
    url, server = engine
    made = case(name)
    hf, imported = families(made)
    ranks(2).run(on_ranks, Layout(tensor=2), from_a_model, hf, imported, url, mtp=made.mtp, fp8=fp8)
    if fp8 is not None:
        export_checkpoint(imported, tmp_path / "exported", source=imported, fp8=named_scheme(fp8))
    written = hf if fp8 is None else tmp_path / "exported"
    source = expected(written)
    arrived = server.state()[0][0]
    wanted = {n: entry[:2] for n, entry in source.items() if made.mtp or not n.startswith("mtp.")}
    assert {n: entry[:2] for n, entry in arrived.items()} == wanted
    assert {n: entry[2] for n, entry in arrived.items()} == raw_digests(
        hf if fp8 is None else tmp_path / "exported", arrived
    )
    assert (server.version, server.paused) == ("2", False)
    if fp8 is not None:
        assert any(dtype == "torch.float8_e4m3fn" for dtype, _, _ in arrived.values())


def raw_digests(hf: Path, names: Held) -> dict[str, str]:
    """SHA-256 of the bytes in the files."""
    found: dict[str, str] = {}
    for file in hf.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            found |= {n: entry[2] for n, entry in held(apart(name, tensor)).items() if n in names}
    return found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transport": "ipc"}, "transport"),
        ({"backend": "mpi"}, "backend"),
        ({"in_flight": "wait"}, "in_flight"),
        ({"prefix_cache": True}, "prefix_cache"),
        ({"bucket_bytes": 0}, "bucket_bytes"),
        ({"timeout": 0}, "timeout"),
        ({"take_over": 1}, "take_over"),
        ({"in_flight": "keep"}, "in_flight='keep' needs prefix_cache='keep'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SGLangOptions(**options)


def test_a_server_is_a_url() -> None:
    with pytest.raises(ValueError, match="url must be a URL such as http://host:30000, got 'host:30000'"):
        SGLangSink("host:30000")
