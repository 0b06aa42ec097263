"""Where tensors are read from: files of either format, or a model that is being trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from megatron_fp32.weights.tensors import TensorInfo


class TensorSource(Protocol):
    """Tensors by name.

    Implemented by `checkpoint.formats.huggingface.HuggingFaceReader` (safetensors), by
    `checkpoint.formats.torch_dist.TorchDistReader`, and by `models.live.LiveTensors` (a Megatron model in memory).
    """

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor, with its global shape."""

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """A tensor, or one element of a stack of tensors.

        Args:
            name: key of `tensors`.
            index: one number for each of the leading axes that are left out; empty for the whole tensor.

        Returns:
            The values, of shape `tensors[name].shape[len(index):]`. The caller does not change them: they may be the
            parameter of a live model.
        """
