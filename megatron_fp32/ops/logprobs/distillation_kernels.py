"""Triton kernels between the products of two models: the sums of a divergence, and its gradient.

Their definitions in plain torch are in `divergence.py` and `divergence_gradient.py`. A definition runs on the CPU, and
the kernel is tested against it.
"""

from __future__ import annotations

from megatron_fp32 import needs_triton  # noqa: F401

# isort: split
import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fp32.ops.logprobs.divergence import FAR, Pair, has_labels
from megatron_fp32.ops.logprobs.kernels import _log, _twice_atanh
from megatron_fp32.ops.products.project_triton import transform
from megatron_fp32.ops.products.shard import BLOCK

_SUM_ROWS = 16
_GRADIENT_ROWS, _GRADIENT_COLUMNS = 8, 256


@triton.jit
def _psi(t):  # type: ignore[no-untyped-def]
    """exp(t) - 1 - t of |t| < 1."""
    series = t * (1.0 / 39916800) + 1.0 / 3628800
    series = series * t + 1.0 / 362880
    series = series * t + 1.0 / 40320
    series = series * t + 1.0 / 5040
    series = series * t + 1.0 / 720
    series = series * t + 1.0 / 120
    series = series * t + 1.0 / 24
    series = series * t + 1.0 / 6
    return t * t * (series * t + 0.5)


@triton.jit
def _expm1(t):  # type: ignore[no-untyped-def]
    return tl.where(tl.abs(t) < 1.0, t + _psi(t), tl.exp(t) - 1.0)


@triton.jit
def _log_ratio_of_mixture(d, part, rest, FAR: tl.constexpr):  # type: ignore[no-untyped-def]
    """log(part exp(d) + rest), where `part` and `rest` add up to 1."""
    # A NaN is none of these: it stays what it is.
    inside = tl.where(d > FAR, FAR, tl.where(d < -FAR, -FAR, d))
    excess = part * _expm1(inside)
    ratio = tl.where(excess < -0.5, part * tl.exp(inside) + rest, 1.0 + excess)
    s = excess / (2.0 + excess)
    log = tl.where(tl.abs(s) < 0.17, _twice_atanh(s), _log(ratio))
    return log + tl.where(d > FAR, d - FAR, 0.0)


@triton.jit
def _times(probability, x):  # type: ignore[no-untyped-def]
    return tl.where(probability == 0.0, 0.0, probability * x)


@triton.jit
def _difference(z, y, top, teacher_top, shift):  # type: ignore[no-untyped-def]
    """log q - log p of logits z and y."""
    return ((y - z) - (teacher_top - top)) - shift


@triton.jit
def _store_sum(term, valid, out, inside):  # type: ignore[no-untyped-def]
    tl.store(out, tl.sum(tl.where(valid, term, 0.0), 1), mask=inside)


@triton.jit
def _divergence_sums_kernel(  # type: ignore[no-untyped-def]
    raw, raw_stride, teacher_raw, teacher_stride, tokens, columns, valid_columns, vectors, sums, scale, cap,
    teacher_scale, teacher_cap, beta, rest,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, JSD: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of one block of columns: the sums of `divergence.sums_torch`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = tl.program_id(1)
    offsets = block * WIDTH + tl.arange(0, WIDTH)
    row_inside = rows < tokens
    inside = row_inside[:, None] & (offsets < columns)[None, :]
    field = tl.cast(tokens, tl.int64)
    vector = vectors + rows
    top = tl.load(vector, mask=row_inside, other=0.0)[:, None]
    log_sum = tl.load(vector + field, mask=row_inside, other=0.0)[:, None]
    inverse = tl.load(vector + 2 * field, mask=row_inside, other=0.0)[:, None]
    teacher_top = tl.load(vector + 3 * field, mask=row_inside, other=0.0)[:, None]
    teacher_log_sum = tl.load(vector + 4 * field, mask=row_inside, other=0.0)[:, None]
    shift = tl.load(vector + 5 * field, mask=row_inside, other=0.0)[:, None]
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(raw + wide * raw_stride + offsets[None, :], mask=inside, other=0.0)
    t = tl.load(teacher_raw + wide * teacher_stride + offsets[None, :], mask=inside, other=0.0)
    z = transform(x, scale, cap, inverse, CAPPED)
    y = transform(t, teacher_scale, teacher_cap, inverse, TEACHER_CAPPED)
    p = tl.exp((z - top) - log_sum)
    q = tl.exp((y - teacher_top) - teacher_log_sum)
    d = _difference(z, y, top, teacher_top, shift)
    near = tl.abs(d) < 1.0
    valid = (offsets < valid_columns)[None, :]
    count: tl.constexpr = 1 + FORWARD + REVERSE + 2 * JSD
    out = sums + block.to(tl.int64) * (field * count) + rows
    excess = tl.where(near, q * _expm1(-d), p - q)
    _store_sum(excess, valid, out, row_inside)
    out += field
    if FORWARD:
        _store_sum(tl.where(near, q * _psi(-d), excess + _times(q, d)), valid, out, row_inside)
        out += field
    if REVERSE:
        _store_sum(tl.where(near, p * _psi(d), -excess - _times(p, d)), valid, out, row_inside)
        out += field
    if JSD:
        of_teacher = _log_ratio_of_mixture(-d, rest, beta, FAR)
        far = rest * excess - _times(q, of_teacher)
        _store_sum(tl.where(tl.abs(of_teacher) < 1.0, q * _psi(of_teacher), far), valid, out, row_inside)
        of_student = _log_ratio_of_mixture(d, beta, rest, FAR)
        far = -beta * excess - _times(p, of_student)
        _store_sum(tl.where(tl.abs(of_student) < 1.0, p * _psi(of_student), far), valid, out + field, row_inside)


def sums_triton(raw: Tensor, teacher_raw: Tensor, vectors: Tensor, pair: Pair) -> Tensor:
    """As `sums_torch`."""
    tokens, columns = raw.shape
    blocks = triton.cdiv(columns, BLOCK)
    divergence, student, teacher = pair.divergence, pair.student.transform, pair.teacher.transform
    sums = torch.empty(blocks, divergence.fields, tokens, dtype=torch.float32, device=raw.device)
    _divergence_sums_kernel[(triton.cdiv(tokens, _SUM_ROWS), blocks)](
        raw, raw.stride(0), teacher_raw, teacher_raw.stride(0), tokens, columns, pair.student.shard.valid_columns,
        vectors.contiguous(), sums, student.scale, student.softcap or 0.0, teacher.scale, teacher.softcap or 0.0,
        divergence.beta, 1 - divergence.beta,
        FORWARD=divergence.forward > 0, REVERSE=divergence.reverse > 0, JSD=divergence.jsd > 0,
        CAPPED=student.softcap is not None, TEACHER_CAPPED=teacher.softcap is not None, FAR=FAR,
        ROWS=_SUM_ROWS, WIDTH=BLOCK,
    )  # fmt: skip
    return sums


@triton.jit
def _divergence_gradient_kernel(  # type: ignore[no-untyped-def]
    raw, raw_stride, teacher_raw, teacher_stride, tokens, first, columns, valid_columns, vectors, labels, pieces,
    pieces_stride, piece_stride, split_scale, scale, cap, teacher_scale, teacher_cap, beta, rest,
    FORWARD: tl.constexpr, REVERSE: tl.constexpr, JSD: tl.constexpr, LABELS: tl.constexpr, CAPPED: tl.constexpr,
    TEACHER_CAPPED: tl.constexpr, COUNT: tl.constexpr, SCALED: tl.constexpr, FAR: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the student's products, written as `COUNT` pieces; `vectors` are from `divergence_vectors`."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offsets = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_inside = rows < tokens
    inside = row_inside[:, None] & (offsets < columns)[None, :]
    field = tl.cast(tokens, tl.int64)
    vector = vectors + rows
    top = tl.load(vector, mask=row_inside, other=0.0)[:, None]
    log_sum = tl.load(vector + field, mask=row_inside, other=0.0)[:, None]
    inverse = tl.load(vector + 2 * field, mask=row_inside, other=0.0)[:, None]
    teacher_top = tl.load(vector + 3 * field, mask=row_inside, other=0.0)[:, None]
    shift = tl.load(vector + 5 * field, mask=row_inside, other=0.0)[:, None]
    correction = tl.load(vector + 6 * field, mask=row_inside, other=0.0)[:, None]
    of_forward = tl.load(vector + 7 * field, mask=row_inside, other=0.0)[:, None]
    of_reverse = tl.load(vector + 8 * field, mask=row_inside, other=0.0)[:, None]
    of_jsd = tl.load(vector + 10 * field, mask=row_inside, other=0.0)[:, None]
    live = (of_forward != 0.0) | (of_reverse != 0.0) | (of_jsd != 0.0)
    wide = rows.to(tl.int64)[:, None]
    x = tl.load(raw + wide * raw_stride + offsets[None, :], mask=inside, other=0.0)
    t = tl.load(teacher_raw + wide * teacher_stride + offsets[None, :], mask=inside, other=0.0)
    z = transform(x, scale, cap, inverse, CAPPED)
    y = transform(t, teacher_scale, teacher_cap, inverse, TEACHER_CAPPED)
    p = tl.exp((z - top) - log_sum)
    d = _difference(z, y, top, teacher_top, shift) - correction
    grad = tl.zeros((ROWS, COLUMNS), tl.float32)
    if FORWARD:
        teacher_log_sum = tl.load(vector + 4 * field, mask=row_inside, other=0.0)[:, None]
        q = tl.exp((y - teacher_top) - teacher_log_sum)
        grad += of_forward * tl.where(tl.abs(d) < 1.0, q * (_psi(-d) - d), p - q)
    if REVERSE:
        reverse = tl.load(vector + 9 * field, mask=row_inside, other=0.0)[:, None]
        grad -= of_reverse * _times(p, d + reverse)
    if JSD:
        to_mixture = tl.load(vector + 11 * field, mask=row_inside, other=0.0)[:, None]
        grad -= of_jsd * _times(p, _log_ratio_of_mixture(d, beta, rest, FAR) + to_mixture)
    grad = tl.where(live, grad * inverse, 0.0)
    if LABELS:
        top = tl.load(vector + 12 * field, mask=row_inside, other=0.0)[:, None]
        log_sum = tl.load(vector + 13 * field, mask=row_inside, other=0.0)[:, None]
        inverse = tl.load(vector + 14 * field, mask=row_inside, other=0.0)[:, None]
        of_all = tl.load(vector + 15 * field, mask=row_inside, other=0.0)[:, None]
        at_label = tl.load(vector + 16 * field, mask=row_inside, other=0.0)[:, None]
        label = tl.load(labels + rows, mask=row_inside, other=-1)[:, None]
        p = tl.exp((transform(x, scale, cap, inverse, CAPPED) - top) - log_sum)
        own = tl.where((first + offsets)[None, :] == label, at_label, -p * of_all)
        has_label = (of_all != 0.0) | (at_label != 0.0)
        grad += tl.where(has_label, own * inverse, 0.0)
        live = live | has_label
    if CAPPED:
        # 1 - tanh^2, without the cancellation.
        e = tl.exp(-2.0 * tl.abs(x * scale / cap))
        grad = grad * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    grad = grad * scale
    if SCALED:
        grad = grad * tl.load(split_scale)
    grad = tl.where((first + offsets < valid_columns)[None, :] & live, grad, 0.0)
    out = pieces + wide * pieces_stride + offsets[None, :]
    for index in tl.static_range(COUNT):
        part = grad.to(pieces.dtype.element_ty)
        tl.store(out + index * tl.cast(piece_stride, tl.int64), part, mask=inside)
        kept = part.to(tl.float32)
        grad = tl.where(kept - kept == 0.0, grad - kept, 0.0)


def gradient_triton(
    raw: Tensor, teacher_raw: Tensor, vectors: Tensor, labels: Tensor, pair: Pair, first: int, count: int,
    dtype: torch.dtype, split_scale: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As `gradient_torch`."""
    divergence, student, teacher = pair.divergence, pair.student.transform, pair.teacher.transform
    tokens, columns = raw.shape
    pieces = torch.empty(count, tokens, columns, dtype=dtype, device=raw.device)
    vectors = vectors.contiguous()
    _divergence_gradient_kernel[(triton.cdiv(tokens, _GRADIENT_ROWS), triton.cdiv(columns, _GRADIENT_COLUMNS))](
        raw, raw.stride(0), teacher_raw, teacher_raw.stride(0), tokens, first, columns,
        pair.student.shard.valid_columns, vectors, labels, pieces, pieces.stride(1), pieces.stride(0),
        vectors if split_scale is None else split_scale, student.scale, student.softcap or 0.0, teacher.scale,
        teacher.softcap or 0.0, divergence.beta, 1 - divergence.beta,
        FORWARD=divergence.forward > 0, REVERSE=divergence.reverse > 0, JSD=divergence.jsd > 0,
        LABELS=has_labels(vectors), CAPPED=student.softcap is not None, TEACHER_CAPPED=teacher.softcap is not None,
        COUNT=count, SCALED=split_scale is not None, FAR=FAR, ROWS=_GRADIENT_ROWS, COLUMNS=_GRADIENT_COLUMNS,
    )  # fmt: skip
    return tuple(pieces.unbind(0))
