"""Trainers of the tests that push into engines: a live model on several ranks, and on one in a process that may die."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32 import export_checkpoint, import_checkpoint, named_scheme, quantize_checkpoint
from megatron_fp32.streaming import Receipt, StreamError, Upload, VllmOptions, VllmSink, WeightStreamer
from megatron_fp32.testing.ranks import RankPool
from tests.checkpoint.layouts import Layout, build, load, on_ranks, save
from tests.engine.server import EngineServer
from tests.engine.test_loads import TOKENS
from tests.families import Case

TP2_PP2 = Layout(tensor=2, pipeline=2)
TRANSFER = '{"backend": "megatron_fp32"}'
FLAGS = ("--hf-overrides", '{"head_dtype": "float32"}', "--weight-transfer-config", TRANSFER)
OPTIONS = VllmOptions(bucket_bytes=256 << 10, timeout=60, lease=0)

State = tuple[dict[str, str], list[float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files:
    """The checkpoints of one model before and after its training."""

    source: Path
    imported: Path
    old: Path
    """What an engine loads before: the source, or the source in FP8."""
    new: Path
    """The export of the trained model."""


def make_files(
    root: Path, case: Case, ranks: Callable[[int], RankPool], *, layout: Layout = TP2_PP2, fp8: str | None = None
) -> Files:
    """Write a checkpoint, import it, train it on the ranks of a layout, save it there, and export what was saved."""
    source = case.write(root / "source", seed=1)
    import_checkpoint(source, root / "imported")
    ranks(layout.ranks).run(on_ranks, layout, save_trained, source, root / "imported", root / "saved")
    scheme = None if fp8 is None else named_scheme(fp8)
    export_checkpoint(root / "saved", root / "new", source=root / "imported", fp8=scheme)
    if fp8 is not None:
        quantize_checkpoint(source, root / "old", fp8)
    return Files(
        source=source, imported=root / "imported", old=source if fp8 is None else root / "old", new=root / "new"
    )


def train(chunks: Sequence[torch.nn.Module]) -> None:
    """Change every value, on all replicas alike. What is fp32 needs its whole mantissa afterwards."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.mul_(1.2345678)


def save_trained(hf: Path, imported: Path, saved: Path, *, layout: Layout) -> None:
    chunks = build(hf, layout)
    load(chunks, imported)
    train(chunks)
    save(chunks, saved)
    dist.barrier()  # the first rank writes the metadata last


def push_both_ways(
    files: Files,
    old: str,
    new: str,
    *,
    layout: Layout,
    fp8: str | None,
    options: VllmOptions,
    token: str | None = None,
) -> list[Receipt]:
    """Push the untrained model into one engine, and the trained one twice into another."""
    chunks = build(files.source, layout)
    load(chunks, files.imported)
    streamer = WeightStreamer(chunks, source=files.imported, fp8=fp8)
    receipts = [streamer.push(VllmSink(new, options=options, token=token), version=6)]
    train(chunks)
    sink = VllmSink(old, options=options, token=token)
    return [*receipts, *(streamer.push(sink, version=version) for version in (7, 8))]


def push_not_finite(files: Files, url: str, *, layout: Layout) -> str:
    """A weight of the last layer is NaN, which FP8 does not have."""
    chunks = build(files.source, layout)
    load(chunks, files.imported)
    train(chunks)
    if dist.get_rank() == dist.get_world_size() - 1:
        with torch.no_grad():
            chunks[0].decoder.layers[-1].mlp.linear_fc2.weight[0, 0] = torch.nan
    streamer = WeightStreamer(chunks, source=files.imported, fp8="like:engine")
    sink = VllmSink(url, options=dataclasses.replace(OPTIONS, bucket_bytes=1 << 16))
    with pytest.raises(ValueError if streamer.is_sender else StreamError) as caught:
        streamer.push(sink, version=9)
    return str(caught.value)


def state(engine: EngineServer) -> State:
    """All that the engine holds, and what it computes with it."""
    return engine.checksums(), engine.logprobs(TOKENS)


class Around:
    """A sink that does something of its own before a tensor."""

    def __init__(self, sink: VllmSink, at: int, action: Callable[[], None]) -> None:
        self._sink, self._at, self._action = sink, at, action
        self.name = sink.name

    @property
    def receipt(self) -> Any:
        return self._sink.receipt

    def begin(self, upload: Upload) -> None:
        self._count = 0
        self._sink.begin(upload)

    def write(self, name: str, tensor: Tensor) -> None:
        if self._count == self._at:
            self._action()
        self._count += 1
        self._sink.write(name, tensor)

    def finish(self) -> None:
        self._sink.finish()

    def abort(self, error: BaseException) -> None:
        self._sink.abort(error)


class Child:
    """A function in a forked process. It exits with 0 unless the function raises or the process is killed.

    A destructor of what the parent has connected would wait for a thread that the child does not have, so the child
    collects no garbage.
    """

    def __init__(self, function: Callable[[], Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            gc.disable()
            try:
                function()
                status = 0
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)

    def wait(self, seconds: float = 40.0) -> int:
        """The exit status; of a killed process, the signal's number with a minus.

        Raises:
            TimeoutError: when the process has not ended in time. It is killed then.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"a child has not ended within {seconds:g} s")
