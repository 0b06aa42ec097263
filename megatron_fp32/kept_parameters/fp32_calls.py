"""Counting fp32 passes, without getting in the way of compilers."""

from __future__ import annotations

from typing import Any

import torch


def count_fp32_call(layer: Any) -> None:
    """Add one to `layer.fp32_calls`; in compiled code only make sure that it is not 0.

    Dynamo takes an integer on a module for a constant: a counter would have it compile again at every call.
    """
    if not torch.compiler.is_compiling():
        layer.fp32_calls += 1
    elif layer.fp32_calls == 0:
        layer.fp32_calls = 1
