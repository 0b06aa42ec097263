"""Pushes into a real vLLM that fail: both sides hear of it, half of a model never answers, the next push is whole.

The tests share two engines. Each test begins with a push of the old weights. The last two tests end an engine each.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from megatron_fp32.errors import TransferError
from megatron_fp32.streaming import Upload, VllmOptions, VllmSink, WeightStreamer
from megatron_fp32.streaming.control import HttpControl
from megatron_fp32.testing.cpu import cpu_megatron, model_parallel, single_process
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.transfer import sender
from tests.checkpoint.layouts import build, load
from tests.engine.server import EngineServer
from tests.engine.test_push import check_both_ways, engines, small
from tests.engine.trainers import OPTIONS, Around, Child, Files, State, make_files, state, train

pytestmark = pytest.mark.engine

TOKEN = "a token of the tests"
FAST = VllmOptions(bucket_bytes=64 << 10, timeout=20, lease=0)
LATE = 16
"""Of 25 tensors: buckets of the first layer have left before it."""


@dataclasses.dataclass(kw_only=True)
class World:
    """Two engines with equal shapes, and the models of a trainer of one rank."""

    files: Files
    first: EngineServer
    second: EngineServer
    old_state: State
    new_state: State
    old: WeightStreamer
    new: WeightStreamer


@pytest.fixture(scope="module")
def world(ranks: Callable[[int], RankPool], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    files = make_files(tmp_path_factory.mktemp("push"), small("Qwen3"), ranks)
    environment = {"MEGATRON_FP32_TOKEN": TOKEN}
    with (
        engines([files.old, files.new], [environment] * 2) as (first, second),
        cpu_megatron(),
        single_process(),
        model_parallel(),
    ):
        streamers = []
        for trained in (False, True):
            chunks = build(files.source)
            load(chunks, files.imported)
            if trained:
                train(chunks)
            streamers.append(WeightStreamer(chunks, source=files.imported))
        yield World(
            files=files, first=first, second=second, old_state=state(first), new_state=state(second),
            old=streamers[0], new=streamers[1],
        )  # fmt: skip


@pytest.fixture
def engine(world: World) -> Iterator[EngineServer]:
    """An engine with the old weights, as version 1."""
    world.old.push(sink(world.first), version=1)
    assert said(world.first) == (False, "1")
    yield world.first
    while _sinks:
        _sinks.pop().close()


_sinks: list[VllmSink] = []


def sink(engine: EngineServer, **options: Any) -> VllmSink:
    """A sink that lives until the end of a test."""
    _sinks.append(VllmSink(engine.url, options=dataclasses.replace(FAST, **options), token=TOKEN))
    return _sinks[-1]


def said(engine: EngineServer) -> tuple[bool, str]:
    """Whether the engine is paused, and its version."""
    return engine.get("/is_paused")["is_paused"], engine.weight_info()["weight_version"]


def kill_self() -> None:
    time.sleep(0.7)  # the engine loads what has come
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    time.sleep(0.7)
    raise OSError("the disk is full")


def check_half(world: World, engine: EngineServer, log: str) -> None:
    """The engine is paused, without a version, with a part of the new weights, and has said why."""
    assert said(engine) == (True, "incomplete")
    sums = engine.checksums()
    assert any(sums[name] == world.new_state[0][name] for name in sums)
    assert any(sums[name] == world.old_state[0][name] for name in sums)
    assert log in engine.log.read_text()


def check_unchanged(world: World, engine: EngineServer) -> None:
    """The engine answers with the old weights and their version."""
    assert said(engine) == (False, "1")
    assert state(engine) == world.old_state


def check_next_push(world: World, engine: EngineServer) -> None:
    """A push from a process that did not see the failure puts the whole of the new weights into the engine."""
    assert Child(lambda: world.new.push(sink(engine), version=3)).wait() == 0
    assert said(engine) == (False, "3")
    assert state(engine) == world.new_state


@pytest.mark.parametrize("stage", ["device", "host"])
def test_what_is_live_on_four_ranks(ranks: Callable[[int], RankPool], world: World, stage: Any) -> None:
    options = dataclasses.replace(OPTIONS, stage=stage, sha256=True)
    world.old.push(sink(world.first), version=1)
    world.new.push(sink(world.second), version=1)
    assert (state(world.first), state(world.second)) == (world.old_state, world.new_state)
    check_both_ways(ranks, world.files, world.first, world.second, options=options, token=TOKEN)


class TestHalf:
    """Failures after the model was touched."""

    def test_the_sender_is_killed(self, world: World, engine: EngineServer) -> None:
        child = Child(lambda: world.new.push(Around(sink(engine), LATE, kill_self), version=2))
        assert child.wait() == -signal.SIGKILL
        check_half(world, engine, "the trainer is gone")
        check_next_push(world, engine)

    def test_the_trainer_fails(self, world: World, engine: EngineServer) -> None:
        with pytest.raises(OSError, match="the disk is full"):
            world.new.push(Around(sink(engine), LATE, fail), version=2)
        check_half(world, engine, "the trainer has stopped this push: OSError: the disk is full")
        # A push that fails before it sends anything does not let half of a model answer.
        with pytest.raises(OSError, match="the disk is full"):
            world.new.push(Around(sink(engine), 0, fail), version=2)
        check_half(world, engine, "the disk is full")
        with pytest.raises(OSError, match="the disk is full"):
            world.new.push(Around(sink(engine, stage="host"), LATE, fail), version=2)
        check_half(world, engine, "the disk is full")
        check_next_push(world, engine)

    @pytest.mark.parametrize("sha256", [False, True])
    def test_bytes_change_on_their_way(
        self, world: World, engine: EngineServer, monkeypatch: pytest.MonkeyPatch, sha256: bool
    ) -> None:
        true, calls = sender.write_checksum, [0]

        def wrong(payload: Tensor, out: Tensor) -> None:
            if not sha256:
                true(payload, out)
            calls[0] += 1
            if calls[0] == 3:
                payload[5] ^= 1
            if sha256:
                true(payload, out)  # the checksum agrees with the changed bytes

        monkeypatch.setattr(sender, "write_checksum", wrong)
        error = r"SHA-256 of model\.layers\.\S+: expected" if sha256 else "the checksum of the tensors from model"
        with pytest.raises(TransferError, match=error):
            world.new.push(sink(engine, sha256=sha256), version=2)
        assert said(engine) == (True, "incomplete")
        assert error.replace("\\S+", "0").replace("\\", "").split("0:")[0] in engine.log.read_text()
        monkeypatch.undo()
        check_next_push(world, engine)

    @pytest.mark.parametrize("missing", ["model.norm.weight", "model.layers.1.mlp.gate_proj.weight"])
    def test_a_tensor_is_missing(self, world: World, engine: EngineServer, missing: str) -> None:
        with pytest.raises(TransferError, match=f"have got no tensor: {missing}"):
            world.new.push(Changed(sink(engine), {missing: None}), version=2)
        assert said(engine) == (True, "incomplete")
        check_next_push(world, engine)

    def test_a_name_is_unknown(self, world: World, engine: EngineServer) -> None:
        renamed = {"model.layers.1.mlp.down_proj.weight": "model.layers.1.mlp.sideways.weight"}
        with pytest.raises(TransferError, match="sideways"):
            world.new.push(Changed(sink(engine), renamed), version=2)
        assert said(engine) == (True, "incomplete")
        check_next_push(world, engine)


class Changed:
    """A sink that leaves tensors out, or calls them by other names."""

    def __init__(self, inner: VllmSink, names: dict[str, str | None]) -> None:
        self._inner, self._names = inner, names

    def begin(self, upload: Upload) -> None:
        named = {self._names.get(name, name): info for name, info in upload.tensors.items()}
        tensors = {name: info for name, info in named.items() if name is not None}
        self._inner.begin(dataclasses.replace(upload, tensors=tensors))

    def write(self, name: str, tensor: Tensor) -> None:
        changed = self._names.get(name, name)
        if changed is not None:
            self._inner.write(changed, tensor)

    def finish(self) -> None:
        self._inner.finish()

    def abort(self, error: BaseException) -> None:
        self._inner.abort(error)


class TestUntouched:
    """Failures that leave the engine with the version that it has."""

    @pytest.mark.parametrize(("stage", "at"), [("host", LATE), ("device", 0)])
    def test_the_trainer_fails(self, world: World, engine: EngineServer, stage: str, at: int) -> None:
        with pytest.raises(OSError, match="the disk is full"):
            world.new.push(Around(sink(engine, stage=stage), at, fail), version=2)
        check_unchanged(world, engine)
        assert "the trainer has stopped this push: OSError: the disk is full" in engine.log.read_text()
        check_next_push(world, engine)

    @pytest.mark.parametrize("token", [None, "another token"])
    def test_a_trainer_without_the_token(
        self, world: World, engine: EngineServer, token: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("MEGATRON_FP32_TOKEN", raising=False)
        with pytest.raises(TransferError, match="does not carry this engine's MEGATRON_FP32_TOKEN"):
            world.new.push(VllmSink(engine.url, options=FAST, token=token), version=2)
        check_unchanged(world, engine)

    @pytest.mark.parametrize("connected", [False, True])
    def test_two_trainers_at_once(self, world: World, engine: EngineServer, connected: bool) -> None:
        """The second one is refused, and does not disturb the first one, also when it was connected before."""
        mine = sink(engine)
        if connected:
            world.old.push(mine, version=1)
        ready, tell = os.pipe()

        def slow() -> None:
            os.write(tell, b"!")
            time.sleep(2)

        child = Child(lambda: world.new.push(Around(sink(engine), LATE, slow), version=5))
        assert os.read(ready, 1) == b"!"
        with pytest.raises(
            TransferError, match="already active|Connection closed" if connected else "another push has begun"
        ):
            world.old.push(mine, version=6)
        assert child.wait() == 0
        assert said(engine) == (False, "5")
        assert state(engine) == world.new_state
        world.old.push(mine, version=6)
        assert said(engine) == (False, "6")
        assert state(engine) == world.old_state


class TestLease:
    @pytest.mark.parametrize("moment", ["paused", "receiving"])
    def test_a_trainer_that_has_sent_nothing(self, world: World, engine: EngineServer, moment: str) -> None:
        """It is killed between the pause and the update, or in the update."""

        def push() -> None:
            if moment == "paused":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(HttpControl, "update", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                    world.new.push(Around(sink(engine, lease=3), 0, lambda: time.sleep(60)), version=2)
            world.new.push(Around(sink(engine, lease=3), 0, kill_self), version=2)

        assert Child(push).wait() == -signal.SIGKILL
        assert said(engine) == (True, "incomplete")
        wait_for(lambda: said(engine) == (False, "1"), 10)
        check_unchanged(world, engine)
        check_next_push(world, engine)

    def test_a_trainer_that_lives_may_take_its_time(self, world: World, engine: EngineServer) -> None:
        """After a failure, and longer than the lease."""
        mine = sink(engine, lease=2)
        with pytest.raises(OSError, match="the disk is full"):
            world.new.push(Around(mine, LATE, fail), version=2)
        time.sleep(5)
        check_half(world, engine, "the disk is full")
        world.new.push(mine, version=3)
        assert state(engine) == world.new_state


class TestTheEnd:
    """What ends engines."""

    def test_an_engine_is_killed(self, world: World, engine: EngineServer) -> None:
        """Another engine goes on, and a new engine gets the version."""
        world.old.push(sink(world.second), version=1)

        def kill() -> None:
            time.sleep(0.7)
            assert world.second._process is not None
            os.killpg(world.second._process.pid, signal.SIGKILL)
            world.second._process.wait()

        start = time.monotonic()
        dying = Around(sink(world.second), LATE, kill)
        receipt = world.new.push([dying, sink(engine)], version=4)
        assert time.monotonic() - start < FAST.timeout
        assert list(receipt.failed) == [world.second.url]
        assert [found.engine for found in receipt.engines] == [engine.url]
        assert said(engine) == (False, "4")
        assert state(engine) == world.new_state
        start = time.monotonic()
        with pytest.raises(TransferError, match=r"did not answer|refused"):
            world.new.push(sink(world.second), version=4)
        assert time.monotonic() - start < FAST.timeout
        with engines([world.files.old]) as (fresh,):
            world.new.push(sink(fresh), version=4)
            assert said(fresh) == (False, "4")
            assert state(fresh) == world.new_state

    def test_an_engine_with_half_of_a_model_ends(self, world: World, engine: EngineServer) -> None:
        child = Child(lambda: world.new.push(Around(sink(engine, lease=3), LATE, kill_self), version=2))
        assert child.wait() == -signal.SIGKILL
        check_half(world, engine, "the trainer is gone")
        # The next trainer dies before it sends anything: the model is still half.
        child = Child(lambda: world.new.push(Around(sink(engine, lease=3), 0, kill_self), version=2))
        assert child.wait() == -signal.SIGKILL
        assert engine._process is not None
        wait_for(lambda: engine._process.poll() is not None, 40)
        assert "has left half of a model: this engine ends" in engine.log.read_text()


def wait_for(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"not after {seconds:g} s"
        time.sleep(0.1)
