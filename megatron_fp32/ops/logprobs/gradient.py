"""dY of log-probs, entropy, logsumexp and mean logit, straight into the 16-bit pieces that the products take.

With p the softmax of the logits z, H its entropy, and upstream gradients g of log p[label], h of H, s of logsumexp(z)
and m of the mean logit:

    dz[v] = g [v = label] - p[v] (g - s + h (log p[v] + H)) + m / vocab

The label's own element is computed as s + (g - s) (1 - p) - h p (log p + H) + m / vocab, with the 1 - p that
`TokenStatistics.rest` holds: g - g p would lose every digit that p has as nines. The mean log-prob is the mean logit
without the logsumexp: an upstream gradient of it is added to m and taken from s.

A token whose label is ignored, or whose upstream gradients are all 0, is not live: all of its coefficients are 0, and
its row of dY is 0 even where its logits are NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs.softmax import Mean, Softmax
from megatron_fp32.ops.logprobs.statistics import KeptLogits, TokenStatistics
from megatron_fp32.ops.products.split import Pieces, split_scale, split_torch


def gradient_vectors(
    statistics: TokenStatistics,
    inverse_temperature: Tensor,
    softmax: Softmax,
    labels: Tensor,
    *,
    logprob: Tensor | None,
    entropy: Tensor | None,
    logsumexp: Tensor | None,
    mean: Tensor | None,
    mean_of: Mean,
) -> Tensor:
    """What dY depends on besides the logits.

    Args:
        statistics: of the tokens.
        inverse_temperature: [tokens] float32.
        softmax: for its vocabulary and `ignore_index`.
        labels: [tokens], indices into the whole vocabulary.
        logprob: upstream gradient [tokens], None for 0. The others likewise.
        entropy: of the entropy.
        logsumexp: of the logsumexp.
        mean: of the mean over the vocabulary.
        mean_of: what it is the mean of.

    Returns:
        [6, tokens] float32: top, log_sum, inverse temperature, what p is multiplied by, the label's element, what every
        element gets; with an upstream gradient of the entropy [8, tokens]: that, and the entropy.
    """
    upstream = [g for g in (logprob, entropy, logsumexp, mean) if g is not None]
    live = labels != softmax.ignore_index
    live = live & torch.stack([g != 0 for g in upstream]).any(0) if upstream else torch.zeros_like(live)
    zeros = torch.zeros_like(statistics.top)
    g = zeros if logprob is None else logprob
    s = zeros if logsumexp is None else logsumexp
    constant = zeros if mean is None else mean / softmax.shard.vocab_size
    if mean is not None and mean_of == "logprob":
        s = s - mean
    # NaN where the logits are NaN, and for a label outside of the vocabulary, which has no element in dY that could be.
    wrong = statistics.log_sum - statistics.log_sum + torch.where(g != 0, statistics.rest - statistics.rest, 0.0)
    of_all = g - s + wrong
    at_label = of_all * statistics.rest + (s + constant)
    if entropy is not None:
        p = statistics.logprob.exp()
        own = torch.where(p == 0, 0.0, p * (statistics.logprob + statistics.entropy))
        at_label = at_label - entropy * own
    at_label = torch.where(softmax.knows(labels), at_label, 0.0)
    vectors = [statistics.top, statistics.log_sum, inverse_temperature, of_all, at_label, constant]
    if entropy is not None:
        vectors += [entropy, statistics.entropy]
    return torch.where(live, torch.stack(vectors), 0.0)


def live_tokens(vectors: Tensor) -> Tensor:
    """[tokens] bool: whose dY is not 0 by its coefficients alone; `vectors` from `gradient_vectors`."""
    live = (vectors[3:6] != 0).any(0)
    return live if len(vectors) == 6 else live | (vectors[6] != 0)


def gradient_scale(vectors: Tensor, softmax: Softmax, *, count: int, dtype: torch.dtype) -> Tensor | None:
    """The power of two [] float32 that dY is multiplied by before it is split; None where it need not be.

    From a bound on its elements instead of the elements, which do not exist yet. A token whose gradient is infinite or
    NaN does not change the scale of the others.
    """
    if dtype != torch.float16 or count == 1:
        return None
    bounds = vectors[4].abs().maximum(vectors[3].abs() + vectors[5].abs())
    if len(vectors) == 8:
        # p |log p| is at most 1 / e, and the entropy at most log(vocab).
        bounds = bounds + vectors[6].abs() * (1 + math.log(softmax.shard.vocab_size))
    return split_scale(bounds * vectors[2] * abs(softmax.transform.scale), count, dtype)


def gradient_bounds(vectors: Tensor, softmax: Softmax) -> Tensor:
    """[tokens] float32, at least the sum of |dY| over the whole vocabulary."""
    bounds = vectors[3].abs() + vectors[4].abs() + softmax.shard.vocab_size * vectors[5].abs()
    if len(vectors) == 8:
        # The sum of p |log p + H| is at most twice the entropy.
        bounds = bounds + vectors[6].abs() * (2 * math.log(softmax.shard.vocab_size))
    return bounds * (vectors[2] * abs(softmax.transform.scale))


def softmax_gradient(
    raw: Tensor,
    vectors: Tensor,
    labels: Tensor,
    softmax: Softmax,
    *,
    first: int,
    count: int,
    dtype: torch.dtype,
    scale: Tensor | None,
    cuts: Tensor | None = None,
    consume: bool = False,
    out: Tensor | None = None,
) -> Pieces:
    """dY of some columns, through the temperature, the soft cap and the scale to the products.

    Args:
        raw: [tokens, columns] float32, products of columns `first` and following of this shard; or 16-bit logits.
        vectors: from `gradient_vectors`.
        labels: [tokens] int32, from `Shard.local_labels`.
        softmax: over the vocabulary, with this rank's columns.
        first: the first of the columns.
        count: how many pieces.
        dtype: of the pieces; float32 knows one.
        scale: from `gradient_scale`.
        cuts: [tokens] float32: columns with a lower logit have no gradient, but for the label; None when all have.
        consume: nobody needs `raw` after this; two pieces take its place.
        out: [tokens, columns] of `dtype`, where a single piece goes; it may be `raw` itself.
    """
    assert out is None or count == 1
    if raw.is_cuda:
        from megatron_fp32.ops.logprobs.kernels import IN_PLACE_COLUMNS, gradient_triton

        # The second piece begins at a multiple of 8 columns, which must not lie beyond the row.
        aligned = raw.stride(0) % 8 == 0 and raw.storage_offset() % 8 == 0
        fits = raw.shape[1] <= IN_PLACE_COLUMNS and aligned
        in_place = consume and count == 2 and dtype.itemsize == 2 and fits
        with torch.cuda.device(raw.device):
            parts = gradient_triton(
                raw, vectors, labels, softmax, first, count, dtype, scale, in_place, cuts=cuts, out=out
            )
    else:
        parts = gradient_torch(raw.float(), vectors, labels, softmax, first, count, dtype, scale, cuts)
        if out is not None:
            parts = (out.copy_(parts[0]),)
    return Pieces(parts, None if scale is None else scale.reciprocal())


def exponentials_gradient(kept: KeptLogits, vectors: Tensor, labels: Tensor, softmax: Softmax) -> Tensor:
    """dY [tokens, columns] in bfloat16 of logits whose exponentials were kept, written over them.

    Args:
        kept: of the tokens, with `tops`, on CUDA.
        vectors: from `gradient_vectors`, without an entropy's.
        labels: [tokens] int32, from `Shard.local_labels`.
        softmax: over the vocabulary, without a soft cap.
    """
    from megatron_fp32.ops.logprobs.kernels import exponentials_gradient_triton

    assert kept.tops is not None
    assert len(vectors) == 6
    assert softmax.transform.softcap is None
    with torch.cuda.device(kept.values.device):
        return exponentials_gradient_triton(kept.values, kept.tops, vectors, labels, softmax)


def gradient_torch(
    raw: Tensor,
    vectors: Tensor,
    labels: Tensor,
    softmax: Softmax,
    first: int,
    count: int,
    dtype: torch.dtype,
    scale: Tensor | None,
    cuts: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The definition of `softmax_gradient`, in torch operators."""
    top, log_sum, inverse_temperature, of_all, at_label, constant = vectors[:6, :, None]
    z = softmax.finished_logits(raw, vectors[2])
    log_p = z - top - log_sum
    slope = of_all
    if len(vectors) == 8:
        slope = slope + vectors[6, :, None] * (log_p + vectors[7, :, None])
    p = log_p.exp()
    grad = constant - torch.where(p == 0, 0.0, p * slope)
    if cuts is not None:
        grad = torch.where(z < cuts[:, None], 0.0, grad)
    columns = torch.arange(first, first + raw.shape[1], device=raw.device)
    grad = torch.where(columns == labels[:, None], at_label, grad)
    grad = grad * inverse_temperature
    if softmax.transform.softcap is not None:
        # 1 - tanh^2, without the cancellation.
        e = torch.exp(-2 * (raw * softmax.transform.scale / softmax.transform.softcap).abs())
        grad = grad * (4 * e / (1 + e).square())
    touched = live_tokens(vectors)[:, None] & (columns < softmax.shard.valid_columns)
    return split_torch(torch.where(touched, grad * softmax.transform.scale, 0.0), count, dtype, scale)
