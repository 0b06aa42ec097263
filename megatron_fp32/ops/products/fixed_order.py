"""The product with one order of summation for every shape.

What makes a logit's bits independent of the batch, the padding and the shard is in `project_triton.py` for CUDA. On the
CPU, where a library chooses its order by the shape, all products have the same shape: `ROWS` tokens, filled up with
zeros, by `COLUMNS` rows of the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp32.ops.products.devices import why_not_tiles
from megatron_fp32.ops.products.gemm import mm_fp32

ROWS, COLUMNS = 64, 128


def why_not_fixed_order(hidden: Tensor, weight: Tensor) -> str | None:
    """Why the product of these two cannot be taken in a fixed order; None when it can."""
    if hidden.dtype != weight.dtype or weight.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden and weight must both be bfloat16 or both be float16, got {hidden.dtype} and {weight.dtype}"
    if not weight.is_cuda:
        return None
    reason = why_not_tiles(weight.device)
    if reason is not None:
        return reason
    if weight.shape[1] % 8 != 0 or not _has_rows_in_line(weight) or weight.data_ptr() % 16 != 0:
        return "it needs a contiguous weight, aligned to 16 bytes, with a multiple of 8 columns"
    return None


def check_fixed_order(hidden: Tensor, weight: Tensor) -> None:
    """Raise ValueError where the product of these two cannot be taken in a fixed order."""
    reason = why_not_fixed_order(hidden, weight)
    if reason is not None:
        raise ValueError(f"invariant=True cannot be kept here: {reason}")


def aligned(hidden: Tensor) -> Tensor:
    """`hidden` [tokens, hidden], contiguous and aligned as the kernel needs it."""
    if _has_rows_in_line(hidden) and hidden.data_ptr() % 16 == 0:
        return hidden
    return hidden.clone(memory_format=torch.contiguous_format)


def _has_rows_in_line(x: Tensor) -> bool:
    """Contiguous, where also the stride of a single row is its length: `is_contiguous` does not look at that one."""
    return x.stride() == (x.shape[1], 1)


def fixed_order_product(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`hidden @ weight.T` in fp32, each element a sum whose order depends on the hidden size alone.

    Args:
        hidden: [tokens, hidden], bfloat16 or float16; see `why_not_fixed_order`.
        weight: [columns, hidden], the dtype of `hidden`.
        out: [tokens, columns] float32 to write into.

    Raises:
        ValueError: see `why_not_fixed_order`.
    """
    check_fixed_order(hidden, weight)
    if hidden.shape[0] == 0 or weight.shape[0] == 0:
        return out
    if not hidden.is_cuda:
        return _on_cpu(hidden, weight, out)
    from megatron_fp32.ops.products.project_triton import project_triton

    fits = out.stride(1) == 1 and out.stride(0) % 4 == 0 and out.data_ptr() % 16 == 0
    # The tensor memory accelerator wants rows at multiples of 16 bytes.
    target = out if fits else out.new_empty(out.shape[0], -(-out.shape[1] // 4) * 4)[:, : out.shape[1]]
    with torch.cuda.device(hidden.device):
        project_triton(aligned(hidden), weight, logits=target)
    return out if fits else out.copy_(target)


def _on_cpu(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    x = hidden.new_empty(ROWS, hidden.shape[1], dtype=torch.float32)
    block = weight.new_empty(COLUMNS, weight.shape[1], dtype=torch.float32)
    product = x.new_empty(ROWS, COLUMNS)
    for column in range(0, weight.shape[0], COLUMNS):
        columns = slice(column, min(column + COLUMNS, weight.shape[0]))
        block.zero_()[: columns.stop - column] = weight[columns]
        for row in range(0, hidden.shape[0], ROWS):
            rows = slice(row, min(row + ROWS, hidden.shape[0]))
            x.zero_()[: rows.stop - row] = hidden[rows]
            mm_fp32(x, block.t(), out=product)
            out[rows, columns] = product[: rows.stop - row, : columns.stop - column]
    return out
