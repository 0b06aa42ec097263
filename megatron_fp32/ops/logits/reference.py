"""The operator written to be obviously right: float64, one process, no tricks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LogitsAndGradients(NamedTuple):
    """Everything the operator computes, in float64."""

    logits: Tensor
    """[..., vocab]"""
    hidden_grad: Tensor
    """[..., hidden]"""
    weight_grad: Tensor
    """[vocab, hidden]"""
    bias_grad: Tensor
    """[vocab]"""


def logits_reference(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`hidden @ weight.T + bias` in float64. hidden [..., hidden], weight [vocab, hidden], bias [vocab]."""
    logits = hidden.double() @ weight.double().t()
    return logits if bias is None else logits + bias.double()


def gradients_reference(
    hidden: Tensor, weight: Tensor, grad_logits: Tensor, bias: Tensor | None = None
) -> LogitsAndGradients:
    """Logits and the gradients for the cotangent `grad_logits` [..., vocab], in float64 throughout."""
    grad_2d = grad_logits.double().reshape(-1, weight.shape[0])
    hidden_2d = hidden.double().reshape(-1, weight.shape[1])
    return LogitsAndGradients(
        logits=logits_reference(hidden, weight, bias),
        hidden_grad=(grad_2d @ weight.double()).reshape(hidden.shape),
        weight_grad=grad_2d.t() @ hidden_2d,
        bias_grad=grad_2d.sum(0),
    )


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of `value - truth`, divided by the Frobenius norm of `truth`; 0 for two zero tensors."""
    truth = truth.double()
    norm = torch.linalg.vector_norm(truth)
    error = torch.linalg.vector_norm(value.double() - truth)
    return float(error if norm == 0 else error / norm)
