"""Matrix products that keep the fp32 accumulator of 16-bit operands.

The product of two bf16 (or fp16) values is exact in fp32, so all that a 16-bit product loses is the accumulator when it
is rounded on the way out. On CUDA `torch.mm(out_dtype=float32)` stores it instead; on the CPU, where that overload does
not exist, the operands are widened first, which is the same sum in another order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_SIXTEEN_BIT = (torch.bfloat16, torch.float16)


def check_operands(hidden: Tensor, weight: Tensor, *, names: tuple[str, str]) -> None:
    """Refuse operands that a matrix product here would have to round.

    Raises:
        TypeError: for DTensors, and unless the second is bfloat16, float16 or float32 and the first has its dtype or is
            float32.
        ValueError: for two float32 operands on CUDA while TF32 is allowed.
    """
    check_plain(**dict(zip(names, (hidden, weight), strict=True)))
    if weight.dtype not in (*_SIXTEEN_BIT, torch.float32) or hidden.dtype not in (weight.dtype, torch.float32):
        raise TypeError(
            f"{names[0]} and {names[1]} must both be bfloat16, float16 or float32, or {names[0]} float32, "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    if weight.is_cuda and weight.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        raise ValueError(
            f"{names[0]} and {names[1]} are float32 and TF32 is allowed: the product would keep 10 of their 23 bits. "
            "Set torch.backends.cuda.matmul.fp32_precision = 'ieee', or pass 16-bit operands, which TF32 does not touch"
        )


def check_plain(**tensors: object) -> None:
    """Raise TypeError, with the name, where a tensor is a DTensor: the operators know process groups, not meshes."""
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            raise TypeError(
                f"{name} must be a plain tensor beside an explicit tp_group, got a DTensor: pass its to_local(), where "
                "all ranks have equally many rows of the weight"
            )


@contextlib.contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No autocast inside the block, and on the CPU no reduced precision either; all is as before after it.

    `torch.set_float32_matmul_precision("medium")` lets the CPU's fp32 product round its operands to bf16.
    """
    cpu = torch.backends.mkldnn
    with torch.autocast(device.type, enabled=False):
        if device.type != "cpu" or cpu.matmul.fp32_precision in ("none", "ieee"):
            yield
            return
        # The precision itself is left alone: what is read there may come from a setting above it, and written back it
        # would no longer follow that setting.
        before = cpu.enabled
        cpu.enabled = False  # type: ignore[assignment]
        try:
            yield
        finally:
            cpu.enabled = before


def mm_fp32(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`a @ b` with fp32 accumulation and fp32 result, whatever autocast and TF32 settings are around it.

    Args:
        a: [m, k], bfloat16, float16 or float32.
        b: [k, n], the dtype of `a`.
        out: [m, n] float32 to write into.
    """
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1], dtype=torch.float32, device=a.device)
    if a.numel() == 0 or b.numel() == 0:
        return out.zero_()
    with _full_precision(a.device):
        if a.is_cuda and a.dtype in _SIXTEEN_BIT:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a.float(), b.float(), out=out)


def addmm_fp32_(accumulator: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`accumulator += a @ b` in fp32, in place. Shapes and dtypes as in `mm_fp32`; accumulator [m, n] float32."""
    if a.numel() == 0 or b.numel() == 0:
        return accumulator
    with _full_precision(a.device):
        if a.is_cuda and a.dtype in _SIXTEEN_BIT:
            return torch.addmm(accumulator, a, b, out_dtype=torch.float32, out=accumulator)
        return accumulator.addmm_(a.float(), b.float())
