"""How the ranks of a push stay in step: what one of them fails in, all of them hear of, and no message is left over."""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_fp32.models.live import LiveTensors
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.spec import TensorSpec
from megatron_fp32.weights.tensors import TensorInfo


class StreamError(RuntimeError):
    """Another rank has failed; the message says which one, and in what."""


class Ranks:
    """The ranks that take part in a push.

    Args:
        group: of these ranks; None for one process alone.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self._alone = self.size == 1

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave the block on all ranks, or raise on all of them.

        Raises:
            StreamError: when the block has failed on another rank alone.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as failure:
            error = failure
        failed: list[str | None] = [_text(error)] * self.size
        if not self._alone:
            dist.all_gather_object(failed, _text(error), group=self.group)
        if error is not None:
            raise error
        for rank, text in enumerate(failed):
            if text is not None:
                raise StreamError(f"rank {rank} failed: {text}")

    def agree(self, error: BaseException | None, sender: int) -> None:
        """Raise on every rank when the sending rank has an error.

        Raises:
            StreamError: on the other ranks.
        """
        text = self.share(_text(error), sender)
        if error is not None:
            raise error
        if text is not None:
            raise StreamError(f"rank {sender}, which sends, failed: {text}")

    def share(self, value: Any, sender: int) -> Any:
        """The sending rank's value, on every rank."""
        shared = [value]
        if not self._alone:
            dist.broadcast_object_list(shared, group=self.group, group_src=sender)
        return shared[0]


def _text(error: BaseException | None) -> str | None:
    return None if error is None else f"{type(error).__name__}: {error}"


class Reception:
    """The live tensors as the sending rank gets them: reading one receives the shards of the other ranks.

    Attributes:
        seconds: spent in reading.
    """

    def __init__(self, live: LiveTensors, sender: int) -> None:
        self._live, self._sender = live, sender
        self._expected: collections.deque[TensorSpec] = collections.deque()
        self.seconds = 0.0

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor of the model."""
        return self._live.tensors

    @contextlib.contextmanager
    def of(self, mappings: Sequence[TensorMapping]) -> Iterator[None]:
        """The other ranks send the tensors of these mappings in this order. What the block does not read is discarded.

        Shards that were left over would be taken for those of the next tensor.
        """
        self._expected.extend(spec for mapping in mappings for spec in mapping.megatron)
        try:
            yield
        finally:
            while self._expected:
                spec = self._expected[0]
                self._live.gather(spec.name, spec.index, to=self._sender)
                self._expected.popleft()

    def skip(self, mapping: TensorMapping) -> None:
        """The tensors of this mapping are not read. The other ranks must have nothing of them to send."""
        for spec in mapping.megatron:
            assert self._expected[0] == spec
            self._expected.popleft()

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """The tensor that the other ranks send next."""
        start = time.monotonic()
        spec = self._expected[0]
        assert (spec.name, spec.index) == (name, index), f"{name}{index} was read, and {spec} is sent next"
        tensor = self._live.gather(name, index, to=self._sender)
        self._expected.popleft()
        self.seconds += time.monotonic() - start
        assert tensor is not None
        return tensor
