"""dY of log-probs, entropy, logsumexp and mean logit, straight into the 16-bit pieces that the products take.

With p the softmax of the logits z, H its entropy, and upstream gradients g of log p[label], h of H, s of logsumexp(z)
and m of the mean logit:

    dz[v] = g [v = label] - p[v] (g - s + h (log p[v] + H)) + m / vocab

The label's own element is computed as s + (g - s) (1 - p) - h p (log p + H) + m / vocab, with the 1 - p that
`TokenStatistics.rest` holds: g - g p would lose every digit that p has as nines.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_fp32.ops.logits.split import Pieces, split_scale, split_torch
from megatron_fp32.ops.logprobs.statistics import KeptLogits, Shard, TokenStatistics


def gradient_vectors(
    statistics: TokenStatistics,
    inverse_temperature: Tensor,
    shard: Shard,
    *,
    logprob: Tensor | None,
    entropy: Tensor | None,
    logsumexp: Tensor | None,
    mean_logit: Tensor | None,
) -> Tensor:
    """What dY depends on besides the logits.

    Args:
        statistics: of the tokens.
        inverse_temperature: [tokens] float32.
        shard: for `vocab_size` and `ignore_index`.
        logprob: upstream gradient [tokens]; 0 for ignored labels. The others likewise.

    Returns:
        [6, tokens] float32: top, log_sum, inverse temperature, what p is multiplied by, the label's element, what every
        element gets; with an upstream gradient of the entropy [8, tokens]: that, and the entropy.
    """
    zeros = torch.zeros_like(statistics.top)
    g = zeros if logprob is None else logprob
    constant = zeros if mean_logit is None else mean_logit / shard.vocab_size
    # A label outside of the vocabulary has no element of its own to say so.
    of_all = torch.where(g != 0, g + (statistics.rest - statistics.rest), 0.0)
    if logsumexp is not None:
        of_all = of_all - logsumexp
    at_label = of_all * statistics.rest + (constant if logsumexp is None else logsumexp + constant)
    vectors = [statistics.top, statistics.log_sum, inverse_temperature, of_all, at_label, constant]
    if entropy is not None:
        logp = statistics.logprob
        vectors[4] = at_label - entropy * logp.exp() * (logp + statistics.entropy)
        vectors += [entropy, statistics.entropy]
    return torch.stack(vectors)


def gradient_scale(vectors: Tensor, shard: Shard, *, count: int, dtype: torch.dtype) -> Tensor | None:
    """The power of two [] float32 that dY is multiplied by before it is split; None where it need not be.

    From a bound on its elements instead of the elements, which do not exist yet.
    """
    if dtype != torch.float16 or count == 1:
        return None
    bounds = vectors[4].abs().maximum(vectors[3].abs() + vectors[5].abs())
    if len(vectors) == 8:
        # p |log p| is at most 1 / e, and the entropy at most log(vocab).
        bounds = bounds + vectors[6].abs() * (1 + math.log(shard.vocab_size))
    return split_scale(bounds * vectors[2] * abs(shard.scale), count, dtype)


def gradient_bounds(vectors: Tensor, shard: Shard) -> Tensor:
    """[tokens] float32, at least the sum of |dY| over the whole vocabulary."""
    bounds = vectors[3].abs() + vectors[4].abs() + shard.vocab_size * vectors[5].abs()
    if len(vectors) == 8:
        # The sum of p |log p + H| is at most twice the entropy.
        bounds = bounds + vectors[6].abs() * (2 * math.log(shard.vocab_size))
    return bounds * (vectors[2] * abs(shard.scale))


def softmax_gradient(
    raw: Tensor,
    vectors: Tensor,
    labels: Tensor,
    shard: Shard,
    *,
    first: int,
    count: int,
    dtype: torch.dtype,
    scale: Tensor | None,
    consume: bool = False,
) -> Pieces:
    """dY of some columns, through the temperature, the soft cap and the scale to the products.

    Args:
        raw: [tokens, columns] float32, products of columns `first` and following of this shard.
        vectors: from `gradient_vectors`.
        labels: [tokens] int32, from `Shard.local_labels`.
        shard: this rank's part.
        first: the first of the columns.
        count: how many pieces.
        dtype: of the pieces; float32 knows one.
        scale: from `gradient_scale`.
        consume: nobody needs `raw` after this; two pieces take its place.
    """
    if raw.is_cuda:
        from megatron_fp32.ops.logprobs.kernels import IN_PLACE_COLUMNS, gradient_triton

        # The second piece begins at a multiple of 8 columns, which must not lie beyond the row.
        aligned = raw.stride(0) % 8 == 0 and raw.storage_offset() % 8 == 0
        fits = raw.shape[1] <= IN_PLACE_COLUMNS and aligned
        in_place = consume and count == 2 and dtype.itemsize == 2 and fits
        with torch.cuda.device(raw.device):
            parts = gradient_triton(raw, vectors, labels, shard, first, count, dtype, scale, in_place)
    else:
        parts = gradient_torch(raw, vectors, labels, shard, first, count, dtype, scale)
    return Pieces(parts, None if scale is None else scale.reciprocal())


def exponentials_gradient(kept: KeptLogits, vectors: Tensor, labels: Tensor, shard: Shard) -> Tensor:
    """dY [tokens, columns] in bfloat16 of logits whose exponentials were kept, written over them.

    Args:
        kept: of the tokens, with `tops`, on CUDA.
        vectors: from `gradient_vectors`, without an entropy's.
        labels: [tokens] int32, from `Shard.local_labels`.
        shard: this rank's part, without a soft cap.
    """
    from megatron_fp32.ops.logprobs.kernels import exponentials_gradient_triton

    assert kept.tops is not None
    assert len(vectors) == 6
    assert shard.softcap is None
    with torch.cuda.device(kept.values.device):
        return exponentials_gradient_triton(kept.values, kept.tops, vectors, labels, shard)


def gradient_torch(
    raw: Tensor,
    vectors: Tensor,
    labels: Tensor,
    shard: Shard,
    first: int,
    count: int,
    dtype: torch.dtype,
    scale: Tensor | None,
) -> tuple[Tensor, ...]:
    """The definition of `softmax_gradient`, in torch operators."""
    top, log_sum, heat, of_all, at_label, constant = vectors[:6, :, None]
    log_p = shard.logits(raw, vectors[2]) - top - log_sum
    slope = of_all
    if len(vectors) == 8:
        slope = slope + vectors[6, :, None] * (log_p + vectors[7, :, None])
    p = log_p.exp()
    grad = constant - torch.where(p == 0, 0.0, p * slope)
    columns = torch.arange(first, first + raw.shape[1], device=raw.device)
    grad = torch.where(columns == labels[:, None], at_label, grad)
    grad = torch.where(columns < shard.valid_columns, grad * heat, 0.0)
    if shard.softcap is not None:
        # 1 - tanh^2, without the cancellation.
        e = torch.exp(-2 * (raw * shard.scale / shard.softcap).abs())
        grad = grad * (4 * e / (1 + e).square())
    return split_torch(grad * shard.scale, count, dtype, scale)
