"""Matrix products that keep the fp32 accumulator of 16-bit operands.

The product of two bf16 (or fp16) values is exact in fp32, so all that a 16-bit product loses is the accumulator when it
is rounded on the way out. On CUDA `torch.mm(out_dtype=float32)` stores it instead; on the CPU, where that overload does
not exist, the operands are widened first: the terms are equal and the order of the sum differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from megatron_fp32.ops.products.operands import SIXTEEN_BIT


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
        if a.is_cuda and a.dtype in SIXTEEN_BIT:
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        return torch.mm(a.float(), b.float(), out=out)


def addmm_fp32_(accumulator: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`accumulator += a @ b` in fp32, in place. Shapes and dtypes as in `mm_fp32`; accumulator [m, n] float32."""
    if a.numel() == 0 or b.numel() == 0:
        return accumulator
    with _full_precision(a.device):
        if a.is_cuda and a.dtype in SIXTEEN_BIT:
            return torch.addmm(accumulator, a, b, out_dtype=torch.float32, out=accumulator)
        return accumulator.addmm_(a.float(), b.float())


def sum_of_products_(out: Tensor, products: Iterable[tuple[Tensor, Tensor]], *, accumulate: bool) -> Tensor:
    """`out = sum of a @ b`, or `+=` with `accumulate`, in fp32; out [m, n] float32, a [m, k] and b [k, n]."""
    for a, b in products:
        if accumulate:
            addmm_fp32_(out, a, b)
        else:
            mm_fp32(a, b, out=out)
        accumulate = True
    return out
