"""Live models that tests push, and what must arrive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32.checkpoint.formats.digests import digest
from megatron_fp32.streaming import Upload, WeightStreamer
from tests.checkpoint.layouts import Layout, build, load, save


class Kept:
    """A sink of ten lines."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.tensors: dict[str, tuple[str, tuple[int, ...], str]] = {}

    def begin(self, upload: Upload) -> None:
        self.announced = {name: (str(info.dtype), info.shape) for name, info in upload.tensors.items()}
        self.calls.append(f"begin {upload.version}")

    def write(self, name: str, tensor: Tensor) -> None:
        assert name not in self.tensors
        self.tensors[name] = (str(tensor.dtype), tuple(tensor.shape), digest(tensor))

    def finish(self) -> None:
        self.calls.append("finish")

    def abort(self, error: BaseException) -> None:
        self.calls.append(f"abort {error}")


def expected(hf: Path, *, transposed: bool = False) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """What a checkpoint holds, fused experts taken apart by their definition in transformers."""
    found = {}
    for file in sorted(hf.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if transposed and ".experts." in name:
                tensor = tensor.transpose(1, 2)
            found |= {n: (str(t.dtype), tuple(t.shape), digest(t)) for n, t in apart(name, tensor).items()}
    return found


def apart(name: str, tensor: Tensor) -> dict[str, Tensor]:
    start, _, kind = name.rpartition(".")
    if not start.endswith(".experts") or kind not in ("gate_up_proj", "down_proj"):
        return {name: tensor}
    found = {}
    for expert, matrix in enumerate(tensor):
        if kind == "down_proj":
            found[f"{start}.{expert}.down_proj.weight"] = matrix
        else:
            gate, up = matrix.chunk(2)
            found |= {f"{start}.{expert}.gate_proj.weight": gate, f"{start}.{expert}.up_proj.weight": up}
    return found


def live(hf: Path, imported: Path, layout: Layout, *, mtp: bool, train: bool) -> Any:
    """The chunks of this rank, with the import's weights; `train` changes each value, on all replicas alike."""
    chunks = build(hf, layout, mtp=mtp)
    load(chunks, imported)
    if train:
        with torch.no_grad():
            for chunk in chunks:
                for parameter in chunk.parameters():
                    parameter.mul_(1.25)
    return chunks


def push(hf: Path, imported: Path, saved: Path | None, *, layout: Layout, mtp: bool, fp8: str | None = None) -> Any:
    chunks = live(hf, imported, layout, mtp=mtp, train=saved is not None)
    if saved is not None:
        save(chunks, saved)
        dist.barrier()
    sender = dist.get_world_size() - 1
    streamer = WeightStreamer(chunks, source=imported, fp8=fp8, sender=sender)
    sink = Kept()
    receipt = streamer.push(sink, version=7)
    assert (receipt.version, receipt.tensors > 0, receipt.sink_seconds > 0) == (7, True, dist.get_rank() == sender)
    if dist.get_rank() != sender:
        assert not sink.calls
        return None
    assert sink.calls == ["begin 7", "finish"]
    assert {name: entry[:2] for name, entry in sink.tensors.items()} == sink.announced
    assert list(sink.tensors) == list(sink.announced)
    return sink.tensors
