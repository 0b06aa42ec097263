"""What the frameworks' functions compute, in float64 and from one sentence each; not from their code."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """log p of the labels, and the entropy; 0 and no gradient for the log-prob of a label of -100."""
    log_p = (logits / temperature).log_softmax(-1)
    picked = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels == -100, 0.0, picked), -(log_p.exp() * log_p).sum(-1)


def next_token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """[batch, tokens - 1]: the log-prob, at every position but the last one, of the token that follows."""
    rows = [token_logprobs(z[: len(t) - 1], t[1:])[0] for z, t in zip(logits, tokens, strict=True)]
    return torch.stack(rows)


def packed_logprobs(logits: Tensor, tokens: Tensor, boundaries: list[int], length: int) -> Tensor:
    """[sequences, length]: the same of each sequence of a pack, cut or filled with zeros."""
    out = []
    for begin, end in itertools.pairwise(boundaries):
        row = logits.new_zeros(length)
        if end > begin:
            found = token_logprobs(logits[begin : end - 1], tokens[begin + 1 : end])[0][:length]
            row = torch.cat([found, row[len(found) :]])
        out.append(row)
    return torch.stack(out)


def context_parallel_part(whole: Tensor, rank: int, ranks: int) -> Tensor:
    """A rank's two parts of a sequence [tokens, ...]."""
    parts = whole.chunk(2 * ranks)
    return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])
