"""The output layer's product as one Triton kernel: a fixed order of summation, and what a softmax needs of each tile.

Every logit is one dot product over the whole hidden dimension, summed from its beginning to its end in steps of
`_BLOCK_K` by one tile configuration. Nothing in that depends on how many tokens or columns there are, or on where in
the batch or the shard a logit lies, so its bits do not either. cuBLAS promises that for no two shapes.

The maximum and the sums that a softmax needs are taken while a tile is still in registers, over blocks of
`BLOCK` columns. Then the logits need not be stored at all.
"""

from __future__ import annotations

from megatron_fp32 import needs_triton  # noqa: F401

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_fp32.ops.products.shard import BLOCK

# One configuration for every shape: another could sum in another order. The fastest on an H200 of those that fit.
_BLOCK_M, _BLOCK_N, _BLOCK_K, _GROUP_M = 128, 2 * BLOCK, 64, 8
_WARPS, _STAGES = 8, 3


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """Hyperbolic tangent, to a few units in the last place."""
    # 1 - e would cancel where x is small; the series ends below fp32 there.
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def _exp_of_distance(x, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """exp(x) of x <= 0, where it is below 1e-38 zero: without the care for subnormals, which costs as much again."""
    if INTERPRETED:
        return tl.exp(x)
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def transform(raw, scale, cap, inverse_temperature, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """The logit that a raw product stands for."""
    if CAPPED:
        return cap * tanh(raw * scale / cap) * inverse_temperature
    return raw * (scale * inverse_temperature)


@triton.jit
def store_statistics(  # type: ignore[no-untyped-def]
    z, rows, column, tokens, columns, valid_columns, statistics, labels, label_logits,
    MEAN: tl.constexpr, INTERPRETED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of a tile [rows, WIDTH] of logits: the maximum, the sums over e = exp(z - maximum) of e and e * (z - maximum),
    what the mean needs, and the label's logit. Returns the e.

    `MEAN` is the number of fields beyond these three: 1 for the sum of z, 2 for the sum of z - maximum and the number
    of its terms. The label takes part in the sum of z only: what remains is the probability that it lacks, without the
    cancellation of 1 - p, however far the label is above the other logits.

    The maximum skips a NaN; the sums do not.
    """
    offsets = column + tl.arange(0, WIDTH)
    inside = (rows < tokens) & (column < columns)
    valid = (offsets < valid_columns)[None, :]
    label = tl.load(labels + rows, mask=inside, other=-1)
    is_label = offsets[None, :] == label[:, None]
    rivals = valid & ~is_label
    others = tl.where(rivals, z, float("-inf"))
    top = tl.max(others, 1)
    origin = tl.where(top == float("-inf"), 0.0, top)
    distance = others - origin[:, None]
    # exp(-150) is 0, and so is 0 times a finite distance.
    bounded = tl.maximum(distance, -150.0, propagate_nan=tl.PropagateNan.ALL)
    e = _exp_of_distance(bounded, INTERPRETED)
    stride = tl.cast(tokens, tl.int64)
    out = statistics + column // WIDTH * (3 + MEAN) * stride + rows
    tl.store(out, top, mask=inside)
    tl.store(out + stride, tl.sum(e, 1), mask=inside)
    tl.store(out + 2 * stride, tl.sum(e * bounded, 1), mask=inside)
    here = inside & (label >= column) & (label < column + WIDTH) & (label < valid_columns)
    if MEAN == 1:
        tl.store(out + 3 * stride, tl.sum(tl.where(valid, z, 0.0), 1), mask=inside)
    if MEAN == 2:
        count = tl.maximum(tl.minimum(valid_columns - column, WIDTH), 0) - here.to(tl.int32)
        tl.store(out + 3 * stride, tl.sum(tl.where(rivals, distance, 0.0), 1), mask=inside)
        tl.store(out + 4 * stride, count.to(tl.float32), mask=inside)
    tl.store(label_logits + rows, tl.sum(tl.where(is_label, z, 0.0), 1), mask=here)
    return e


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    raw, row, column, tokens, columns, valid_columns, logits, statistics, labels, label_logits, inverse_temperature,
    scale, cap,
    STORE: tl.constexpr, EXPONENTIALS: tl.constexpr, STATISTICS: tl.constexpr, MEAN: tl.constexpr, CAPPED: tl.constexpr,
    INTERPRETED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    if STORE and not EXPONENTIALS:
        logits.store([row, column], raw)
    if STATISTICS:
        rows = row + tl.arange(0, ROWS)
        inverse = tl.load(inverse_temperature + rows, mask=rows < tokens, other=1.0)
        z = transform(raw, scale, cap, inverse[:, None], CAPPED)
        e = store_statistics(
            z, rows, column, tokens, columns, valid_columns, statistics, labels, label_logits, MEAN, INTERPRETED, WIDTH
        )  # fmt: skip
        if EXPONENTIALS:
            logits.store([row, column], e.to(tl.float16))


# Specialized on a number of tokens that divides by 16, or on an alignment, the compiler may choose another layout and
# with it another order of summation.
@triton.jit(
    do_not_specialize=["tokens", "columns", "valid_columns"],
    do_not_specialize_on_alignment=["statistics", "labels", "label_logits", "inverse_temperature"],
)
def _project_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, tokens, columns, hidden_size, valid_columns, logits, statistics, labels, label_logits,
    inverse_temperature, scale, cap,
    STORE: tl.constexpr, EXPONENTIALS: tl.constexpr, STATISTICS: tl.constexpr, MEAN: tl.constexpr, CAPPED: tl.constexpr,
    INTERPRETED: tl.constexpr, PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    width: tl.constexpr = BLOCK_N // 2
    tiles_m = tl.cdiv(tokens, BLOCK_M)
    tiles_n = tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first = tile // (GROUP_M * tiles_n) * GROUP_M
        height = tl.minimum(tiles_m - first, GROUP_M)
        row = (first + tile % (GROUP_M * tiles_n) % height) * BLOCK_M
        column = tile % (GROUP_M * tiles_n) // height * BLOCK_N
        raw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, hidden_size, BLOCK_K):
            x = hidden.load([row, k])
            w = weight.load([column, k])
            if INTERPRETED:
                x, w = x.to(tl.float32), w.to(tl.float32)
            raw = tl.dot(x, w.T, raw)
        # In halves: staged in shared memory as a whole, the tile would leave no room for the operands of the next one.
        left, right = raw.reshape(BLOCK_M, 2, width).permute(0, 2, 1).split()
        _finish(
            left, row, column, tokens, columns, valid_columns, logits, statistics, labels, label_logits,
            inverse_temperature, scale, cap, STORE, EXPONENTIALS, STATISTICS, MEAN, CAPPED, INTERPRETED, BLOCK_M, width,
        )  # fmt: skip
        _finish(
            right, row, column + width, tokens, columns, valid_columns, logits, statistics, labels, label_logits,
            inverse_temperature, scale, cap, STORE, EXPONENTIALS, STATISTICS, MEAN, CAPPED, INTERPRETED, BLOCK_M, width,
        )  # fmt: skip


def project_triton(
    hidden: Tensor,
    weight: Tensor,
    *,
    logits: Tensor | None = None,
    statistics: Tensor | None = None,
    labels: Tensor | None = None,
    label_logits: Tensor | None = None,
    inverse_temperature: Tensor | None = None,
    valid_columns: int = 0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Multiply, and write the raw logits, their statistics, or both.

    Args:
        hidden: [tokens, hidden], 16 bits, rows contiguous and aligned to 16 bytes; not empty.
        weight: [columns, hidden], likewise.
        logits: [tokens, columns] with rows aligned to 16 bytes: float32 for the products; or, when statistics are
            taken, float16 for exp(z - maximum) with the maximum of the block, and 0 for the label.
        statistics: [ceil(columns / BLOCK), 3 to 5, tokens] float32; see `store_statistics`. The rest of the
            arguments is for them.
        labels: [tokens] int32, the column of each token's label; any other value for none.
        label_logits: [tokens] float32; written where the label is one of these columns.
        inverse_temperature: [tokens] float32.
        valid_columns: columns from here on are padding.
        scale: multiplies the products.
        softcap: cap * tanh(z / cap) after that.
    """
    store, take = logits is not None, statistics is not None
    assert store or take
    assert take or logits is None or logits.dtype == torch.float32
    tokens, hidden_size = hidden.shape
    # In the interpreter, which has no tensor cores and no bfloat16 products.
    interpreted = not hidden.is_cuda
    programs = 2 if interpreted else torch.cuda.get_device_properties(hidden.device).multi_processor_count
    _project_kernel[(programs,)](
        TensorDescriptor.from_tensor(hidden, [_BLOCK_M, _BLOCK_K]),
        TensorDescriptor.from_tensor(weight, [_BLOCK_N, _BLOCK_K]),
        tokens, weight.shape[0], hidden_size, valid_columns,
        TensorDescriptor.from_tensor(logits, [_BLOCK_M, BLOCK]) if store else 0,
        statistics, labels, label_logits, inverse_temperature, scale, 0.0 if softcap is None else softcap,
        STORE=store, EXPONENTIALS=logits is not None and logits.dtype == torch.float16,
        STATISTICS=take, MEAN=0 if statistics is None else statistics.shape[1] - 3, CAPPED=softcap is not None,
        INTERPRETED=interpreted, PROGRAMS=programs,
        BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, BLOCK_K=_BLOCK_K, GROUP_M=_GROUP_M,
        num_warps=_WARPS, num_stages=_STAGES,
    )  # fmt: skip
