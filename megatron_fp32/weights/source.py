"""The protocol for reading tensors from files of both formats, or from a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from megatron_fp32.weights.tensors import TensorInfo


class TensorSource(Protocol):
    """Tensors by name.

    Three classes implement it: `checkpoint.formats.huggingface.HuggingFaceReader` (safetensors),
    `checkpoint.formats.torch_dist.TorchDistReader`, and `models.live.LiveTensors` (a Megatron model in memory).
    """

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, with its global shape."""

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """A tensor, or one element of a stack of tensors.

        Args:
            name: a key of `tensors`.
            index: one number for each leading axis of the stack; () for the whole tensor.

        Returns:
            The values, of shape `tensors[name].shape[len(index):]`. Do not change them: they may be the parameter of a
            live model.
        """
