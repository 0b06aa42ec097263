"""The operator written to be obviously right: float64, one process, no tricks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogprobsReference(NamedTuple):
    """Everything about each token, in float64; 0 for ignored labels, but for the logits."""

    logits: Tensor
    """[tokens, vocab]"""
    logprobs: Tensor
    """[tokens]"""
    entropy: Tensor
    """[tokens], nats"""
    logsumexp: Tensor
    """[tokens]"""
    mean_logit: Tensor
    """[tokens]"""


def logprobs_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int | None = None,
    temperature: float | Tensor = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> LogprobsReference:
    """hidden [tokens, hidden], weight [vocab or more, hidden], labels [tokens]; differentiable by autograd."""
    logits = hidden.double() @ weight.double().t()[:, :vocab_size] * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.double()[:, None]
    logits = logits / temperature
    logp = logits.log_softmax(1)
    ignored = labels == ignore_index
    picked = logp.gather(1, labels.masked_fill(ignored, 0)[:, None])[:, 0]
    fields = {
        "logprobs": picked,
        "entropy": torch.special.entr(logp.exp()).sum(1),
        "logsumexp": logits.logsumexp(1),
        "mean_logit": logits.mean(1),
    }
    return LogprobsReference(logits=logits, **{name: torch.where(ignored, 0.0, x) for name, x in fields.items()})
