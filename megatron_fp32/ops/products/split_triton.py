"""`split` in one pass over memory: reads 4 bytes a value and writes 2 a piece."""

from __future__ import annotations

from megatron_fp32 import needs_triton  # noqa: F401

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit
def _split_kernel(  # type: ignore[no-untyped-def]
    x_ptr, scale_ptr, parts_ptr, columns, row_stride, part_stride, COUNT: tl.constexpr, SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < columns
    rest = tl.load(x_ptr + row * row_stride + offsets, mask=inside, other=0.0)
    if SCALED:
        rest = rest * tl.load(scale_ptr)
    out = parts_ptr + row * columns + offsets
    for index in tl.static_range(COUNT):
        part = rest.to(parts_ptr.dtype.element_ty)
        tl.store(out + index * tl.cast(part_stride, tl.int64), part, mask=inside)
        wide = part.to(tl.float32)
        # Infinity and NaN are the values for which v - v is not zero.
        rest = tl.where(wide - wide == 0.0, rest - wide, 0.0)


def split_triton(x: Tensor, count: int, dtype: torch.dtype, scale: Tensor | None) -> tuple[Tensor, ...]:
    """The pieces of `x` [rows, columns] float32, bit-equal to `split_torch`; arguments as in `split`."""
    rows, columns = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    parts = torch.empty(count, rows, columns, dtype=dtype, device=x.device)
    if x.numel() > 0:
        _split_kernel[(rows, triton.cdiv(columns, _BLOCK))](
            x, x if scale is None else scale, parts, columns, x.stride(0), parts.stride(0),
            COUNT=count, SCALED=scale is not None, BLOCK=_BLOCK,
        )  # fmt: skip
    return tuple(parts.unbind(0))
