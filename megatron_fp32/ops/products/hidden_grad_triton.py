"""dX as one Triton kernel that can be stopped and taken up again: a fixed order of summation, its state in fp32.

Every element is one chain of sums over the columns of dY, in steps of `_BLOCK_K`, in the accumulator of the tensor
core. The chain can begin where an earlier call ended, with another part of the vocabulary or on another GPU: an fp32
accumulator loses nothing on its way through memory.
"""

from __future__ import annotations

from megatron_fp32 import needs_triton  # noqa: F401

# isort: split
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# One configuration for every shape: another could sum in another order.
_BLOCK_M, _BLOCK_N, _BLOCK_K, _GROUP_M = 128, 256, 64, 8
_WARPS, _STAGES = 8, 3
_STAGES_OF_THREE_PIECES = 2
"""More do not fit into shared memory; how many there are does not change the order."""


@triton.jit
def _step(grad, w, row, k, total, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    dy = grad.load([row, k])
    if INTERPRETED:
        dy, w = dy.to(tl.float32), w.to(tl.float32)
    return tl.dot(dy, w, total)


# Specialized on a number of tokens or columns, the compiler may choose another order of summation.
@triton.jit(do_not_specialize=["tokens", "columns"])
def _hidden_grad_kernel(  # type: ignore[no-untyped-def]
    first, second, third, weight, target, tokens, columns, hidden_size,
    COUNT: tl.constexpr, BEGIN: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(hidden_size, BLOCK_N)
    group = tile // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - group, GROUP_M)
    row = (group + tile % (GROUP_M * tiles_n) % height) * BLOCK_M
    column = tile % (GROUP_M * tiles_n) // height * BLOCK_N
    rows = row + tl.arange(0, BLOCK_M)
    offsets = column + tl.arange(0, BLOCK_N)
    pointers = target + rows.to(tl.int64)[:, None] * hidden_size + offsets[None, :]
    inside = (rows < tokens)[:, None] & (offsets < hidden_size)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if not BEGIN:
        total = tl.load(pointers, mask=inside, other=0.0)
    for k in range(0, columns, BLOCK_K):
        w = weight.load([k, column])
        # Small terms first.
        if COUNT == 3:
            total = _step(third, w, row, k, total, INTERPRETED)
        if COUNT >= 2:
            total = _step(second, w, row, k, total, INTERPRETED)
        total = _step(first, w, row, k, total, INTERPRETED)
    tl.store(pointers, total, mask=inside)


def add_hidden_grad(target: Tensor, grads: tuple[Tensor, ...], weight: Tensor, *, begin: bool) -> None:
    """Take the chain of sums in `target` further by `sum of grad @ weight`; with `begin`, from zero.

    Args:
        target: [tokens, hidden] float32, contiguous.
        grads: up to three pieces of dY, [tokens, columns] of 16 bits, largest first; rows contiguous.
        weight: [columns, hidden], 16 bits, contiguous and aligned to 16 bytes; fewer rows stand for zeros.
    """
    tokens, hidden_size = target.shape
    interpreted = not target.is_cuda
    pieces = [TensorDescriptor.from_tensor(_aligned(x), [_BLOCK_M, _BLOCK_K]) for x in grads]
    grid = (triton.cdiv(tokens, _BLOCK_M) * triton.cdiv(hidden_size, _BLOCK_N),)
    _hidden_grad_kernel[grid](
        pieces[0], pieces[min(1, len(pieces) - 1)], pieces[-1],
        TensorDescriptor.from_tensor(weight, [_BLOCK_K, _BLOCK_N]),
        target, tokens, grads[0].shape[1], hidden_size,
        COUNT=len(grads), BEGIN=begin, INTERPRETED=interpreted,
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, GROUP_M=_GROUP_M,
        num_warps=_WARPS, num_stages=_STAGES if len(grads) < 3 else _STAGES_OF_THREE_PIECES,
    )  # fmt: skip


def _aligned(x: Tensor) -> Tensor:
    """With rows at multiples of 16 bytes, as the tensor memory accelerator wants them."""
    if x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return x.new_empty(x.shape[0], -(-x.shape[1] // 8) * 8)[:, : x.shape[1]].copy_(x)
