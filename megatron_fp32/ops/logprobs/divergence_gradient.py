"""dY of divergences and of the labels' log-probs, straight into the 16-bit pieces that the products take.

The gradients of the divergences are in `divergence.py`, that of a log-prob in `gradient.py`. Both are added in fp32
before they are rounded to pieces. A token whose upstream gradients are all 0 has a row of zeros, even where its logits
are NaN; one of the two that is 0 leaves the other as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs.divergence import (
    DIVERGENCE_FIELDS,
    LABEL_FIELDS,
    Divergence,
    Pair,
    TokenDivergence,
    differences,
    has_labels,
    log_probs,
    log_ratio_of_mixture,
    psi,
)
from megatron_fp32.ops.products.split import Pieces, split_scale, split_torch


def divergence_vectors(
    of: TokenDivergence, inverse_temperature: Tensor, upstream: Tensor | None, pair: Pair, label_vectors: Tensor | None
) -> Tensor:
    """What dY depends on besides the logits.

    Args:
        of: the tokens.
        inverse_temperature: [tokens] float32.
        upstream: [tokens] float32, gradient of the divergence, 0 for tokens that do not count; None for zeros.
        pair: whose divergence.
        label_vectors: from `gradient_vectors`, for the log-probs alone; None where they have no gradient.

    Returns:
        [12, tokens] float32: top, log_sum, inverse temperature, the teacher's top and log_sum, shift, correction, what
        the forward KL's gradient is multiplied by, the reverse KL's and its value, the JSD's and KL(p || m). With label
        vectors [17, tokens]: their first five rows.
    """
    g = torch.zeros_like(of.top) if upstream is None else upstream
    divergence = pair.divergence
    vectors = torch.stack(
        [
            of.top, of.log_sum, inverse_temperature, of.teacher_top, of.teacher_log_sum, of.shift, of.correction,
            divergence.forward * g,
            divergence.reverse * g, of.reverse,
            divergence.jsd * (1 - divergence.beta) * g, of.to_mixture,
        ]
    )  # fmt: skip
    vectors = torch.where(g != 0, vectors, 0.0)
    return vectors if label_vectors is None else torch.cat([vectors, label_vectors[:LABEL_FIELDS]])


def _live(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """[tokens] bool: whose divergence has a gradient, and whose log-prob."""
    of_divergence = (vectors[7] != 0) | (vectors[8] != 0) | (vectors[10] != 0)
    if not has_labels(vectors):
        return of_divergence, torch.zeros_like(of_divergence)
    return of_divergence, (vectors[15] != 0) | (vectors[16] != 0)


def live_tokens(vectors: Tensor) -> Tensor:
    """[tokens] bool: whose dY is not 0 by its coefficients alone."""
    of_divergence, of_label = _live(vectors)
    return of_divergence | of_label


def divergence_scale(vectors: Tensor, pair: Pair, *, count: int, dtype: torch.dtype) -> Tensor | None:
    """The power of two [] float32 that dY is multiplied by before it is split; None where it need not be.

    From a bound on its elements. |p - q| is at most 1. Of the terms -p d, whose sum is KL(p || q), those below 0 have a
    sum of at least -1, because p d <= q - p there: none is larger than KL(p || q) + 1. The same holds of p log(p / m).
    """
    if dtype != torch.float16 or count == 1:
        return None
    scale = abs(pair.student.transform.scale)
    bounds = vectors[7].abs() + vectors[8].abs() * (2 * vectors[9] + 1) + vectors[10].abs() * (2 * vectors[11] + 1)
    bounds = bounds * vectors[2] * scale
    if has_labels(vectors):
        bounds = bounds + vectors[15].abs().maximum(vectors[16].abs()) * vectors[14] * scale
    return split_scale(bounds, count, dtype)


def divergence_gradient(
    raw: Tensor,
    teacher_raw: Tensor,
    vectors: Tensor,
    labels: Tensor,
    pair: Pair,
    *,
    first: int,
    count: int,
    dtype: torch.dtype,
    scale: Tensor | None,
) -> Pieces:
    """dY of some columns, through the temperature, the student's soft cap and its scale to the products.

    Args:
        raw: [tokens, columns] float32, products of columns `first` and following of this shard.
        teacher_raw: [tokens, columns] float32, the teacher's products of the same columns.
        vectors: from `divergence_vectors`.
        labels: [tokens] int32, from `Shard.local_labels`; looked at where the vectors are for labels.
        pair: whose divergence.
        first: the first of the columns.
        count: how many pieces.
        dtype: of the pieces; float32 knows one.
        scale: from `divergence_scale`.
    """
    if raw.is_cuda:
        from megatron_fp32.ops.logprobs.distillation_kernels import gradient_triton

        with torch.cuda.device(raw.device):
            parts = gradient_triton(raw, teacher_raw, vectors, labels, pair, first, count, dtype, scale)
    else:
        parts = gradient_torch(raw, teacher_raw, vectors, labels, pair, first, count, dtype, scale)
    return Pieces(parts, None if scale is None else scale.reciprocal())


def gradient_torch(
    raw: Tensor,
    teacher_raw: Tensor,
    vectors: Tensor,
    labels: Tensor,
    pair: Pair,
    first: int,
    count: int,
    dtype: torch.dtype,
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """The definition of `divergence_gradient`, in torch operators."""
    student = pair.student
    of_divergence, of_label = _live(vectors)
    grad = _of_divergence(raw, teacher_raw, vectors, pair) * vectors[2, :, None]
    grad = torch.where(of_divergence[:, None], grad, 0.0)
    columns = torch.arange(first, first + raw.shape[1], device=raw.device)
    if has_labels(vectors):
        top, log_sum, inverse_temperature, of_all, at_label = vectors[DIVERGENCE_FIELDS:]
        p = log_probs(raw, student, inverse_temperature, top, log_sum).exp()
        own = torch.where(columns == labels[:, None], at_label[:, None], -p * of_all[:, None])
        grad = grad + torch.where(of_label[:, None], own * inverse_temperature[:, None], 0.0)
    if student.transform.softcap is not None:
        # 1 - tanh^2, without the cancellation.
        e = torch.exp(-2 * (raw * student.transform.scale / student.transform.softcap).abs())
        grad = grad * (4 * e / (1 + e).square())
    touched = (of_divergence | of_label)[:, None] & (columns < student.shard.valid_columns)
    return split_torch(torch.where(touched, grad * student.transform.scale, 0.0), count, dtype, scale)


def _of_divergence(raw: Tensor, teacher_raw: Tensor, vectors: Tensor, pair: Pair) -> Tensor:
    """With respect to the logits."""
    top, log_sum, inverse_temperature, teacher_top, teacher_log_sum, _, correction = vectors[:7]
    divergence: Divergence = pair.divergence
    of_forward, of_reverse, reverse, of_jsd, to_mixture = vectors[7:DIVERGENCE_FIELDS, :, None]
    p = log_probs(raw, pair.student, inverse_temperature, top, log_sum).exp()
    d = differences(raw, teacher_raw, pair, vectors) - correction[:, None]
    grad = torch.zeros_like(raw)
    if divergence.forward > 0:
        q = log_probs(teacher_raw, pair.teacher, inverse_temperature, teacher_top, teacher_log_sum).exp()
        near = torch.where(d.abs() < 1, q * (psi(-d) - d), p - q)
        grad = grad + of_forward * near
    if divergence.reverse > 0:
        grad = grad - of_reverse * torch.where(p == 0, 0.0, p * (d + reverse))
    if divergence.jsd > 0:
        slope = log_ratio_of_mixture(d, divergence.beta, 1 - divergence.beta) + to_mixture
        grad = grad - of_jsd * torch.where(p == 0, 0.0, p * slope)
    return grad
