"""Counts the forward passes of a layer in fp32, without making Dynamo compile again."""

from __future__ import annotations

from typing import Any

import torch


def count_fp32_call(layer: Any) -> None:
    """Add one to `layer.fp32_calls`. In compiled code, only make sure that it is not 0.

    Dynamo treats an integer on a module as a constant, so it would compile again at every call if this counted.
    """
    if not torch.compiler.is_compiling():
        layer.fp32_calls += 1
    elif layer.fp32_calls == 0:
        layer.fp32_calls = 1
