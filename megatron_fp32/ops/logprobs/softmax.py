"""The softmax over the vocabulary that a token's numbers are taken from."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from megatron_fp32.ops.products.shard import BLOCK, Shard
from megatron_fp32.validation import check_finite

Mean = Literal["none", "logit", "logprob"]
"""What is averaged over the vocabulary: nothing, the logits, or the log-probs."""

FIELDS: dict[Mean, int] = {"none": 3, "logit": 4, "logprob": 5}
"""How many statistics each block has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitsTransform:
    """What a model does to the products of its output layer: `softcap * tanh(scale * product / softcap)`.

    The temperature is not part of it, because it may differ from call to call and from token to token.

    Raises:
        TypeError: on construction, for a value that is not a number.
        ValueError: on construction, for a `scale` that is not finite, or a `softcap` that is not positive and finite.
    """

    scale: float = 1.0
    """Multiplies the product, as MuP does."""

    softcap: float | None = None
    """Gemma's soft cap; None for none."""

    def __post_init__(self) -> None:
        check_finite("scale", self.scale)
        if self.softcap is not None:
            check_finite("softcap", self.softcap, positive=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Softmax:
    """How the products of this rank become logits, and which of them are tokens of the vocabulary."""

    shard: Shard
    """This rank's columns."""
    transform: LogitsTransform
    """From products to logits."""
    ignore_index: int
    """The label of tokens without one."""
    invariant: bool
    """Sum in an order that no sharding changes."""

    def logits(self, raw: Tensor, inverse_temperature: Tensor) -> Tensor:
        """Logits [tokens, columns] from products, in torch; `inverse_temperature` [tokens]."""
        inverse_temperature = inverse_temperature[:, None]
        scale, softcap = self.transform.scale, self.transform.softcap
        if softcap is None:
            return raw * (inverse_temperature * scale)
        return softcap * torch.tanh(raw * scale / softcap) * inverse_temperature

    def finished_logits(self, raw: Tensor, inverse_temperature: Tensor) -> Tensor:
        """As `logits`, with the same bits whatever the number of columns: on the CPU, a block of them at a time."""
        if raw.is_cuda:
            return self.logits(raw, inverse_temperature)
        z = torch.empty_like(raw)
        for first in range(0, raw.shape[1], BLOCK):
            part = slice(first, min(first + BLOCK, raw.shape[1]))
            z[:, part] = self.logits(raw[:, part], inverse_temperature)
        return z

    @property
    def of_finished_logits(self) -> Softmax:
        """The softmax of logits, in place of products."""
        return dataclasses.replace(self, transform=LogitsTransform())

    def knows(self, labels: Tensor) -> Tensor:
        """[tokens] bool: whether each label is a token of the vocabulary."""
        return (labels >= 0) & (labels < self.shard.vocab_size) & (labels != self.ignore_index)
