"""How many tokens and columns are worked on at a time."""

from __future__ import annotations

import torch

BYTES = 1200 * 2**20
"""Memory for a chunk of logits and their gradient when `chunk_size` is None: 2048 tokens of a vocabulary of 152
thousand. Less memory costs speed, because every pass over the tokens reads and writes `main_grad` once. More memory
gains little."""

STATISTICS_TOKENS = 16384
"""Tokens whose statistics are taken at a time: 12 bytes for each of them and 128 columns."""

GRADIENT_TOKENS = 8192
"""Tokens at a time in a backward pass of its own, which goes by chunks of the vocabulary."""

HIDDEN_GRAD_TOKENS = 2048
"""Tokens whose dX is in fp32 at a time where all of their dY is there."""

GRADIENT_COLUMNS = 8192
"""Columns of dY pieces that exist at a time, in addition to a chunk of logits."""


def workspace_bytes(device: torch.device, *, parallel: bool) -> int:
    """`BYTES`, or half of what is free on the device where that is less.

    With `parallel` ranks it is always `BYTES`, because each chunk takes part in collectives and all ranks must cut
    alike. It is also `BYTES` under deterministic algorithms: the free memory changes from run to run, and the chunks
    decide the order of summation.
    """
    if device.type != "cuda" or parallel or torch.are_deterministic_algorithms_enabled():
        return BYTES
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(BYTES, (free + cached) // 2)
