"""The trainer's weights for vLLM's own senders, for those who keep them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_fp32.streaming.streamer import WeightStreamer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """A tensor before it is sent, with the fields of vLLM's `ParamMeta`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class VllmWeightSource:
    """A `WeightSource` (vllm/distributed/weight_transfer/base.py) for vLLM's `nccl` sender, and for `ipc` on one rank.

    vLLM's senders only call the methods below, so that the trainer needs no vLLM to make this object. vLLM sends from
    rank 0, which must be the sender of the streamer. Unlike `VllmSink`, vLLM's own way does not check what arrives,
    accepts a half-sent model, and cannot unpack FP8 tensors of odd sizes.

    Args:
        streamer: whose tensors are sent.
    """

    def __init__(self, streamer: WeightStreamer) -> None:
        self._streamer = streamer

    def metadata(self) -> list[Described]:
        """What iteration will yield. Every rank calls it, as vLLM's `nccl` sender does."""
        infos = self._streamer.contents()
        return [Described(name=name, dtype=info.dtype, shape=info.torch_shape) for name, info in infos.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every tensor on the sending rank. The other ranks send their shards, and get nothing."""
        return iter(self._streamer)

    def held_names(self) -> None:
        """None, which says that the sending rank has every tensor."""
