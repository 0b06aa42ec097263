"""dW of a dY in pieces, added to an fp32 gradient buffer by the memory system itself.

A library's products with `beta=1` read and write the buffer once for each piece. Here a tile sums over the pieces
before it leaves through the tensor memory accelerator as a reduction: added on the way to memory, while the next tile
is multiplied. Each element is added to once per call, so the result does not depend on any order.
"""

from __future__ import annotations

from megatron_fp32 import needs_triton  # noqa: F401

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_fp32.ops.products.devices import why_not_tiles

_BLOCK_M, _BLOCK_N, _BLOCK_K, _GROUP_M = 128, 256, 64, 8
_WARPS, _STAGES = 8, 3


@triton.jit
def _add(target, row, column, tile, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    if INTERPRETED:
        target.store([row, column], target.load([row, column]) + tile)
    else:
        target.atomic_add([row, column], tile)


@triton.jit
def _products(grad, hidden, row, column, tokens, total, INTERPRETED: tl.constexpr, BLOCK_K: tl.constexpr):  # type: ignore[no-untyped-def]
    for k in range(0, tokens, BLOCK_K):
        dy = grad.load([k, row])
        x = hidden.load([k, column])
        if INTERPRETED:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        total = tl.dot(dy.T, x, total)
    return total


# Specialized on a single token, the loop over tokens would be unrolled, and take more shared memory than there is.
@triton.jit(do_not_specialize=["tokens", "rows", "columns"])
def _weight_grad_kernel(  # type: ignore[no-untyped-def]
    first, second, third, hidden, target, tokens, rows, columns,
    COUNT: tl.constexpr, INTERPRETED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tiles_m = tl.cdiv(rows, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    half: tl.constexpr = BLOCK_N // 2
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=COUNT == 1):
        group = tile // (GROUP_M * tiles_n) * GROUP_M
        height = tl.minimum(tiles_m - group, GROUP_M)
        row = (group + tile % (GROUP_M * tiles_n) % height) * BLOCK_M
        column = tile % (GROUP_M * tiles_n) // height * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        # Small terms first.
        if COUNT == 3:
            total = _products(third, hidden, row, column, tokens, total, INTERPRETED, BLOCK_K)
        if COUNT >= 2:
            total = _products(second, hidden, row, column, tokens, total, INTERPRETED, BLOCK_K)
        total = _products(first, hidden, row, column, tokens, total, INTERPRETED, BLOCK_K)
        left, right = total.reshape(BLOCK_M, 2, half).permute(0, 2, 1).split()
        _add(target, row, column, left, INTERPRETED)
        _add(target, row, column + half, right, INTERPRETED)


def can_add_weight_grad(target: Tensor, grads: tuple[Tensor, ...], hiddens: tuple[Tensor, ...]) -> bool:
    """Whether `add_weight_grad` takes these: dtypes, alignment and GPU."""
    if not target.is_cuda or target.dtype != torch.float32 or len(hiddens) != 1 or target.numel() == 0:
        return False
    operands = (*grads, *hiddens)
    return (
        why_not_tiles(target.device) is None
        and all(x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] > 0 for x in operands)
        and all(_aligned(x) for x in (target, *operands))
    )


def _aligned(x: Tensor) -> bool:
    rows_apart = x.stride(0) >= x.shape[1] and x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and rows_apart and x.data_ptr() % 16 == 0


def add_weight_grad(target: Tensor, grads: tuple[Tensor, ...], hidden: Tensor) -> None:
    """`target += sum of grad.T @ hidden`, the sum in fp32.

    Args:
        target: [columns of dY, hidden] float32.
        grads: up to three pieces of dY, [tokens, columns of dY], 16 bits, largest first.
        hidden: [tokens, hidden], 16 bits.
    """
    tokens, rows = grads[0].shape
    interpreted = not target.is_cuda
    programs = 2 if interpreted else torch.cuda.get_device_properties(target.device).multi_processor_count
    pieces = [TensorDescriptor.from_tensor(x, [_BLOCK_K, _BLOCK_M]) for x in (*grads, grads[0], grads[0])]
    _weight_grad_kernel[(programs,)](
        *pieces[:3],
        TensorDescriptor.from_tensor(hidden, [_BLOCK_K, _BLOCK_N]),
        TensorDescriptor.from_tensor(target, [_BLOCK_M, _BLOCK_N // 2]),
        tokens, rows, target.shape[1],
        COUNT=len(grads), INTERPRETED=interpreted, PROGRAMS=programs,
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, GROUP_M=_GROUP_M,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
