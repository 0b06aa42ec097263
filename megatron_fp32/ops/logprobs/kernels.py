"""Triton kernels between the matrix products: statistics of stored logits, their combination, the softmax's gradient.

Each has its definition in plain torch in the module of its caller, `statistics.py` or `gradient.py`. The definition
runs on the CPU, and the kernel is tested against it.
"""

from __future__ import annotations

from megatron_fp32 import needs_triton  # noqa: F401

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fp32.ops.logprobs.softmax import Softmax
from megatron_fp32.ops.products.project_triton import store_statistics, transform
from megatron_fp32.ops.products.shard import BLOCK

_STATISTICS_ROWS = 16
_COMBINE_LANES, _COMBINE_TOKENS = 64, 64
_GRADIENT_ROWS, _GRADIENT_COLUMNS = 8, 256
IN_PLACE_COLUMNS = 8192
"""Columns at most of a gradient that is written over its logits."""


@triton.jit
def _statistics_kernel(  # type: ignore[no-untyped-def]
    raw, raw_stride, tokens, columns, valid_columns, statistics, labels, label_logits, inverse_temperature, scale, cap,
    MEAN: tl.constexpr, CAPPED: tl.constexpr, INTERPRETED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * WIDTH
    offsets = column + tl.arange(0, WIDTH)
    inside = (rows < tokens)[:, None] & (offsets < columns)[None, :]
    pointers = raw + rows.to(tl.int64)[:, None] * raw_stride + offsets[None, :]
    tile = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    inverse = tl.load(inverse_temperature + rows, mask=rows < tokens, other=1.0)
    z = transform(tile, scale, cap, inverse[:, None], CAPPED)
    store_statistics(
        z, rows, column, tokens, columns, valid_columns, statistics, labels, label_logits, MEAN, INTERPRETED, WIDTH
    )


def statistics_triton(
    raw: Tensor, labels: Tensor, inverse_temperature: Tensor, softmax: Softmax, statistics: Tensor, label_logits: Tensor
) -> None:
    """As `statistics_torch`."""
    shard, scale, softcap = softmax.shard, softmax.transform.scale, softmax.transform.softcap
    tokens, columns = raw.shape
    _statistics_kernel[(triton.cdiv(tokens, _STATISTICS_ROWS), statistics.shape[0])](
        raw, raw.stride(0), tokens, columns, shard.valid_columns, statistics, labels, label_logits, inverse_temperature,
        scale, softcap or 0.0,
        MEAN=statistics.shape[1] - 3, CAPPED=softcap is not None, INTERPRETED=not raw.is_cuda,
        ROWS=_STATISTICS_ROWS, WIDTH=BLOCK,
    )  # fmt: skip


# One order of summation for every number of tokens and blocks: see `_project_kernel`.
@triton.jit(do_not_specialize=["blocks", "tokens"], do_not_specialize_on_alignment=["statistics", "out"])
def _combine_kernel(  # type: ignore[no-untyped-def]
    statistics, out, blocks, tokens, MEAN: tl.constexpr, BLOCKS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Combine the statistics of many blocks into the statistics of one.

    Block b is added in lane b mod `BLOCKS`, whatever the number of blocks: blocks that are all padding, which are
    zeros at the end, change no bit.
    """
    fields: tl.constexpr = 3 + MEAN
    columns = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    lanes = tl.arange(0, BLOCKS)
    field = tl.cast(tokens, tl.int64)
    stride = field * fields
    pointers = statistics + lanes.to(tl.int64)[:, None] * stride + columns[None, :]
    inside = (columns < tokens)[None, :]

    tops = tl.full((BLOCKS, TOKENS), float("-inf"), tl.float32)
    for start in range(0, blocks, BLOCKS):
        mask = inside & (start + lanes < blocks)[:, None]
        tops = tl.maximum(tops, tl.load(pointers + start * stride, mask=mask, other=float("-inf")))
    top = tl.max(tops, 0)
    origin = tl.where(top == float("-inf"), 0.0, top)

    sums = tl.zeros((BLOCKS, TOKENS), tl.float32)
    weighted = tl.zeros((BLOCKS, TOKENS), tl.float32)
    totals = tl.zeros((BLOCKS, TOKENS), tl.float32)
    counts = tl.zeros((BLOCKS, TOKENS), tl.float32)
    for start in range(0, blocks, BLOCKS):
        mask = inside & (start + lanes < blocks)[:, None]
        here = pointers + start * stride
        block_top = tl.load(here, mask=mask, other=float("-inf"))
        block_sum = tl.load(here + field, mask=mask, other=0.0)
        block_weighted = tl.load(here + 2 * field, mask=mask, other=0.0)
        distance = block_top - origin[None, :]
        factor = tl.exp(distance)
        sums += block_sum * factor
        weighted += tl.where(factor == 0.0, 0.0, (block_weighted + block_sum * distance) * factor)
        if MEAN == 1:
            totals += tl.load(here + 3 * field, mask=mask, other=0.0)
        if MEAN == 2:
            count = tl.load(here + 4 * field, mask=mask, other=0.0)
            # From each block's maximum to the maximum of all blocks.
            totals += tl.load(here + 3 * field, mask=mask, other=0.0) + tl.where(count == 0.0, 0.0, count * distance)
            counts += count
    tl.store(out + columns, top, mask=columns < tokens)
    tl.store(out + field + columns, tl.sum(sums, 0), mask=columns < tokens)
    tl.store(out + 2 * field + columns, tl.sum(weighted, 0), mask=columns < tokens)
    if MEAN > 0:
        tl.store(out + 3 * field + columns, tl.sum(totals, 0), mask=columns < tokens)
    if MEAN == 2:
        tl.store(out + 4 * field + columns, tl.sum(counts, 0), mask=columns < tokens)


def combine_triton(statistics: Tensor) -> Tensor:
    """As `combine_torch`."""
    blocks, fields, tokens = statistics.shape
    out = statistics.new_empty(1, fields, tokens)
    _combine_kernel[(triton.cdiv(tokens, _COMBINE_TOKENS),)](
        statistics.contiguous(), out, blocks, tokens,
        MEAN=fields - 3, BLOCKS=_COMBINE_LANES, TOKENS=_COMBINE_TOKENS,
    )  # fmt: skip
    return out


@triton.jit
def _twice_atanh(s):  # type: ignore[no-untyped-def]
    """log((1 + s) / (1 - s)) for |s| <= 0.18, to a few units in the last place."""
    y = s * s
    return 2.0 * s * (1.0 + y * (1.0 / 3 + y * (1.0 / 5 + y * (1.0 / 7 + y * (1.0 / 9)))))


@triton.jit
def _log(x):  # type: ignore[no-untyped-def]
    """log of a positive number, to a few units in the last place, which the device's approximation is not.

    Of a denormal it is too large; infinity and NaN stay what they are.
    """
    bits = x.to(tl.int32, bitcast=True)
    # x = 2^exponent times something between sqrt(1/2) and sqrt(2), whose bits are 0x3F3504F3.
    exponent = (bits - 0x3F3504F3) >> 23
    rest = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    power = exponent.to(tl.float32)
    # log(2) in two parts, the first of few enough bits for an exact product.
    log = power * 0.693145751953125 + (power * 1.42860682030941723e-6 + _twice_atanh((rest - 1.0) / (rest + 1.0)))
    return tl.where(x - x == 0.0, log, x)


@triton.jit
def _log1p(x):  # type: ignore[no-untyped-def]
    """log(1 + x) of x >= 0."""
    return tl.where(x < 0.4, _twice_atanh(x / (2.0 + x)), _log(1.0 + x))


@triton.jit
def _finish_kernel(  # type: ignore[no-untyped-def]
    statistics, label_logits, labels, out, tokens, vocab_size, ignore_index, MEAN: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = columns < tokens
    field = tl.cast(tokens, tl.int64)
    here = statistics + columns
    rival = tl.load(here, mask=inside, other=0.0)
    others = tl.load(here + field, mask=inside, other=0.0)
    weighted = tl.load(here + 2 * field, mask=inside, other=0.0)
    index = tl.load(labels + columns, mask=inside, other=0)
    ignored = index == ignore_index
    known = (index >= 0) & (index < vocab_size) & (index != ignore_index)
    label = tl.where(known, tl.load(label_logits + columns, mask=inside, other=0.0), float("-inf"))
    top = tl.maximum(rival, label)
    below = rival - top
    factor = tl.exp(below)
    weighted = tl.where(factor == 0.0, 0.0, (weighted + others * below) * factor)
    others = others * factor
    distance = label - top
    own = tl.exp(distance)
    total = others + own
    log_sum = tl.where(distance == 0.0, _log1p(others), _log(total))
    logprob = tl.where(known, distance - log_sum, float("nan"))
    rest = tl.where(known, others / total, float("nan"))
    entropy = log_sum - (weighted + tl.where(own == 0.0, 0.0, own * distance)) / total
    out = out + columns
    tl.store(out, tl.where(ignored, 0.0, top), mask=inside)
    tl.store(out + field, tl.where(ignored, 0.0, log_sum), mask=inside)
    tl.store(out + 2 * field, tl.where(ignored, 0.0, logprob), mask=inside)
    tl.store(out + 3 * field, tl.where(ignored, 0.0, rest), mask=inside)
    tl.store(out + 4 * field, tl.where(ignored, 0.0, entropy), mask=inside)
    if MEAN > 0:
        mean = tl.load(here + 3 * field, mask=inside, other=0.0)
        if MEAN == 2:
            count = tl.load(here + 4 * field, mask=inside, other=0.0)
            mean += tl.where(count == 0.0, 0.0, count * below) + tl.where(known, distance, 0.0)
        mean = mean / vocab_size
        if MEAN == 2:
            mean -= log_sum
        tl.store(out + 5 * field, tl.where(ignored, 0.0, mean), mask=inside)


def finish_triton(statistics: Tensor, label_logits: Tensor, labels: Tensor, softmax: Softmax) -> tuple[Tensor, ...]:
    """As `finish_torch`."""
    _, fields, tokens = statistics.shape
    out = statistics.new_empty(5 if fields == 3 else 6, tokens)
    _finish_kernel[(triton.cdiv(tokens, 128),)](
        statistics.contiguous(), label_logits, labels.contiguous(), out, tokens, softmax.shard.vocab_size,
        softmax.ignore_index,
        MEAN=fields - 3, TOKENS=128,
    )  # fmt: skip
    return tuple(out.unbind(0))


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    raw, raw_stride, tokens, first, columns, valid_columns, vectors, labels, pieces, pieces_stride, piece_stride,
    split_scale, scale, cap, cuts,
    ENTROPY: tl.constexpr, CAPPED: tl.constexpr, COUNT: tl.constexpr, SCALED: tl.constexpr, IN_PLACE: tl.constexpr,
    CUT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of products, written as `COUNT` pieces; `vectors` are the rows of `gradient_vectors`.

    A token that is not live (see `live_tokens`) gets zeros, whatever its logits are.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = rows < tokens
    inside = row_inside[:, None] & (offsets < columns)[None, :]
    vector = vectors + rows
    field = tl.cast(tokens, tl.int64)
    top = tl.load(vector, mask=row_inside, other=0.0)[:, None]
    log_sum = tl.load(vector + field, mask=row_inside, other=0.0)[:, None]
    inverse_temperature = tl.load(vector + 2 * field, mask=row_inside, other=0.0)[:, None]
    of_all = tl.load(vector + 3 * field, mask=row_inside, other=0.0)[:, None]
    at_label = tl.load(vector + 4 * field, mask=row_inside, other=0.0)[:, None]
    constant = tl.load(vector + 5 * field, mask=row_inside, other=0.0)[:, None]
    live = (of_all != 0.0) | (at_label != 0.0) | (constant != 0.0)
    label = tl.load(labels + rows, mask=row_inside, other=-1)[:, None]

    logits = raw + rows.to(tl.int64)[:, None] * raw_stride + offsets[None, :]
    x = tl.load(logits, mask=inside, other=0.0).to(tl.float32)
    if IN_PLACE:
        # One thread's piece may lie where another one's logit was.
        tl.debug_barrier()
    z = transform(x, scale, cap, inverse_temperature, CAPPED)
    log_p = (z - top) - log_sum
    slope = of_all
    if ENTROPY:
        of_entropy = tl.load(vector + 6 * field, mask=row_inside, other=0.0)[:, None]
        entropy = tl.load(vector + 7 * field, mask=row_inside, other=0.0)[:, None]
        live = live | (of_entropy != 0.0)
        slope = slope + of_entropy * (log_p + entropy)
    grad = constant - tl.exp(log_p) * slope
    if ENTROPY:
        # p log p is 0 where p is; the difference to at_label is what its entropy term adds.
        grad = tl.where(log_p == float("-inf"), constant, grad)
    if CUT:
        # A NaN is not below the cut.
        grad = tl.where(z < tl.load(cuts + rows, mask=row_inside, other=0.0)[:, None], 0.0, grad)
    grad = tl.where((first + offsets)[None, :] == label, at_label, grad)
    grad = grad * inverse_temperature
    if CAPPED:
        # 1 - tanh^2, without the cancellation.
        e = tl.exp(-2.0 * tl.abs(x * scale / cap))
        grad = grad * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    grad = grad * scale
    if SCALED:
        grad = grad * tl.load(split_scale)
    grad = tl.where((first + offsets < valid_columns)[None, :] & live, grad, 0.0)
    out = pieces + rows.to(tl.int64)[:, None] * pieces_stride + offsets[None, :]
    for index in tl.static_range(COUNT):
        part = grad.to(pieces.dtype.element_ty)
        tl.store(out + index * tl.cast(piece_stride, tl.int64), part, mask=inside)
        wide = part.to(tl.float32)
        grad = tl.where(wide - wide == 0.0, grad - wide, 0.0)


def gradient_triton(
    raw: Tensor, vectors: Tensor, labels: Tensor, softmax: Softmax, first: int, count: int, dtype: torch.dtype,
    split_scale: Tensor | None, in_place: bool = False, *, cuts: Tensor | None = None, out: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `gradient_torch`; `in_place` writes two pieces of up to `IN_PLACE_COLUMNS` columns where `raw` was.

    A single piece goes to `out`, which may be `raw`.
    """
    shard, scale, softcap = softmax.shard, softmax.transform.scale, softmax.transform.softcap
    tokens, columns = raw.shape
    rows, width = (1, triton.next_power_of_2(columns)) if in_place else (_GRADIENT_ROWS, _GRADIENT_COLUMNS)
    if in_place:
        # Rows have room for a multiple of 8 columns, so the second piece is aligned to 16 bytes as well.
        step = -(-columns // 8) * 8
        assert count == 2
        assert dtype.itemsize == 2
        assert columns <= IN_PLACE_COLUMNS
        assert step <= raw.stride(0)
        pieces = torch.empty(0, dtype=dtype, device=raw.device).set_(
            raw.untyped_storage(), 2 * raw.storage_offset(), (count, tokens, columns), (step, 2 * raw.stride(0), 1)
        )
    elif out is not None:
        assert count == 1
        assert out.stride(1) == 1
        pieces = out[None]
    else:
        pieces = torch.empty(count, tokens, columns, dtype=dtype, device=raw.device)
    grid = (triton.cdiv(tokens, rows), triton.cdiv(columns, width))
    _gradient_kernel[grid](
        raw, raw.stride(0), tokens, first, columns, shard.valid_columns, vectors, labels, pieces, pieces.stride(1),
        pieces.stride(0), vectors if split_scale is None else split_scale, scale, softcap or 0.0,
        vectors if cuts is None else cuts.contiguous(),
        ENTROPY=len(vectors) == 8, CAPPED=softcap is not None, COUNT=count, SCALED=split_scale is not None,
        IN_PLACE=in_place or out is not None, CUT=cuts is not None, ROWS=rows, COLUMNS=width,
        num_warps=8 if in_place else 4,
    )  # fmt: skip
    return tuple(pieces.unbind(0))


@triton.jit
def _exponentials_gradient_kernel(  # type: ignore[no-untyped-def]
    exponentials, stride, tokens, columns, valid_columns, tops, vectors, labels, out, scale,
    tops_stride, vectors_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    offsets = block * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = rows < tokens
    inside = row_inside[:, None] & (offsets < columns)[None, :]
    vector = vectors + rows
    field = tl.cast(vectors_stride, tl.int64)
    top = tl.load(vector, mask=row_inside, other=0.0)
    log_sum = tl.load(vector + field, mask=row_inside, other=0.0)
    inverse_temperature = tl.load(vector + 2 * field, mask=row_inside, other=0.0)
    of_all = tl.load(vector + 3 * field, mask=row_inside, other=0.0)
    at_label = tl.load(vector + 4 * field, mask=row_inside, other=0.0)
    constant = tl.load(vector + 5 * field, mask=row_inside, other=0.0)
    live = (of_all != 0.0) | (at_label != 0.0) | (constant != 0.0)
    label = tl.load(labels + rows, mask=row_inside, other=-1)
    block_top = tl.load(tops + tl.cast(block, tl.int64) * tops_stride + rows, mask=row_inside, other=0.0)
    slope = tl.exp(block_top - top - log_sum) * of_all * (inverse_temperature * scale)
    pointers = rows.to(tl.int64)[:, None] * stride + offsets[None, :]
    e = tl.load(exponentials + pointers, mask=inside, other=0.0).to(tl.float32)
    grad = (constant * (inverse_temperature * scale))[:, None] - e * slope[:, None]
    grad = tl.where(offsets[None, :] == label[:, None], (at_label * (inverse_temperature * scale))[:, None], grad)
    grad = tl.where((offsets < valid_columns)[None, :] & live[:, None], grad, 0.0)
    tl.store(out + pointers, grad.to(out.dtype.element_ty), mask=inside)


def exponentials_gradient_triton(
    exponentials: Tensor, tops: Tensor, vectors: Tensor, labels: Tensor, softmax: Softmax
) -> Tensor:
    """dY [tokens, columns] bfloat16, in the memory of `exponentials` [tokens, columns] float16; see its caller."""
    tokens, columns = exponentials.shape
    out = exponentials.view(torch.bfloat16)
    _exponentials_gradient_kernel[(triton.cdiv(tokens, _STATISTICS_ROWS), triton.cdiv(columns, BLOCK))](
        exponentials, exponentials.stride(0), tokens, columns, softmax.shard.valid_columns, tops, vectors, labels, out,
        softmax.transform.scale, tops.stride(0), vectors.stride(0),
        ROWS=_STATISTICS_ROWS, COLUMNS=BLOCK,
    )  # fmt: skip
    return out
