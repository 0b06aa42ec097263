"""Which operands a product here takes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def piece_dtype(hidden: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """The dtype that these operands are multiplied in: a float32 one beside one of 16 bits is split into pieces.

    Args:
        hidden: the dtype of the hidden states.
        weight: the dtype of the weight.
    """
    return hidden if weight == torch.float32 else weight


def check_operands(hidden: Tensor, weight: Tensor, *, names: tuple[str, str]) -> None:
    """Refuse operands that a matrix product here would have to round.

    Raises:
        TypeError: for DTensors, and unless both are bfloat16, float16 or float32 alike, or the first is float32 beside
            a second of 16 bits, or the second is float32 beside a first in bfloat16.
        ValueError: for two float32 operands on CUDA while TF32 is allowed.
    """
    check_plain(**dict(zip(names, (hidden, weight), strict=True)))
    # float16 pieces of a float32 weight would need a scale for each row, and dX, a sum over rows, could not undo those.
    split_weight = hidden.dtype == torch.bfloat16 and weight.dtype == torch.float32
    alike = hidden.dtype in (weight.dtype, torch.float32)
    if weight.dtype not in (*SIXTEEN_BIT, torch.float32) or not (alike or split_weight):
        raise TypeError(
            f"{names[0]} and {names[1]} must both be bfloat16, float16 or float32, or {names[0]} float32, or "
            f"{names[1]} float32 beside bfloat16, got {hidden.dtype} and {weight.dtype}"
        )
    whole = piece_dtype(hidden.dtype, weight.dtype) == torch.float32
    if weight.is_cuda and whole and torch.backends.cuda.matmul.fp32_precision == "tf32":
        raise ValueError(
            f"{names[0]} and {names[1]} are float32 and TF32 is allowed: the product would keep 10 of their 23 bits. "
            "Set torch.backends.cuda.matmul.fp32_precision = 'ieee', or pass 16-bit operands, which TF32 does not touch"
        )


def check_shapes(hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless these are hidden [..., hidden] of 2 or more dimensions and weight [vocab, hidden]."""
    if weight.dim() != 2 or hidden.dim() < 2 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "expected hidden [..., hidden] of 2 or more dimensions and weight [vocab, hidden], "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )


def check_bias(bias: Tensor | None, weight: Tensor) -> None:
    """Refuse a bias that does not belong to the weight [vocab, hidden], or that fp32 does not hold.

    Raises:
        TypeError: for another type, a DTensor, or another dtype than bfloat16, float16 and float32.
        ValueError: for another shape than [vocab], or another device than the weight's.
    """
    if bias is None:
        return
    check_plain(bias=bias)
    if not isinstance(bias, Tensor) or bias.dtype not in (*SIXTEEN_BIT, torch.float32):
        what = bias.dtype if isinstance(bias, Tensor) else repr(bias)
        raise TypeError(f"bias must be a bfloat16, float16 or float32 tensor or None, got {what}")
    if bias.shape != weight.shape[:1] or bias.device != weight.device:
        raise ValueError(
            f"expected bias [{weight.shape[0]}] on {weight.device}, got {tuple(bias.shape)} on {bias.device}"
        )


def check_plain(**tensors: object) -> None:
    """Raise TypeError, with the argument's name, where a tensor is a DTensor.

    The operators take the process group as an argument, and do not know device meshes.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name} must be a plain tensor, with the process group as an argument of its own, got a DTensor: pass "
                "its to_local(), where all ranks have equally many rows of the weight"
            )
