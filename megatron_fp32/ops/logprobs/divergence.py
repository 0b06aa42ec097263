"""Divergences between a teacher's and a student's distribution over the vocabulary, without cancellation.

With q the teacher's distribution, p the student's, z the student's logits and d = log q - log p:

    KL(q || p) = sum of q d, and its gradient with respect to z is p - q
    KL(p || q) = -(sum of p d), and its gradient is -p (d + KL(p || q))
    JSD = beta KL(q || m) + (1 - beta) KL(p || m) with m = beta q + (1 - beta) p,
        and its gradient is (1 - beta) p (log(p / m) - KL(p || m))

This JSD is the generalized one of GKD (arXiv 2306.13649, equation 1).

Close to the teacher, the terms q d are of the size of d and cancel to a sum of the size of d^2. The difference p - q
sums to 0. Added to the terms it makes q psi(-d) of them, with psi(t) = exp(t) - 1 - t: of the size of d^2, and never
negative. The other sums become those of p psi(d), q psi(log(m / q)) and p psi(log(m / p)). A series gives psi of a
small t all of its digits. The gradients use p - q = q expm1(-d).

A log of a sum of exponentials is off by some 2^-24 of itself, which is more than d may be. This error shifts all d of a
token alike, by c. It shows in the sum S of p - q, which would be 0: c = -log1p(S). The sums above see only c^2, which
`finish` takes away; the gradients subtract c from d.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs.softmax import Softmax
from megatron_fp32.ops.products.shard import BLOCK
from megatron_fp32.validation import check_finite

DIVERGENCE_FIELDS, LABEL_FIELDS = 12, 5

FAR = 40.0
"""Beyond this |d| the log of a mixture is linear in it: exp(-40) is below the last bit of 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Divergence:
    """A weighted sum of divergences of the student p from the teacher q, for each token.

    `forward * KL(q || p) + reverse * KL(p || q) + jsd * JSD_beta`, in nats, at one temperature for both models. The
    squared temperature that Hinton et al. multiply it by (arXiv 1503.02531) is not applied.

    Raises:
        TypeError: on construction, for a value that is not a number.
        ValueError: on construction, for weights that are negative, not finite or all 0, or a `beta` outside of (0, 1).
    """

    forward: float = 0.0
    """Weight of KL(q || p), whose minimum covers all that the teacher finds probable."""

    reverse: float = 0.0
    """Weight of KL(p || q), whose minimum avoids what the teacher finds improbable."""

    jsd: float = 0.0
    """Weight of beta KL(q || m) + (1 - beta) KL(p || m), with m = beta q + (1 - beta) p."""

    beta: float = 0.5
    """The teacher's part in m."""

    def __post_init__(self) -> None:
        for name in ("forward", "reverse", "jsd"):
            check_finite(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        check_finite("beta", self.beta)
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must be more than 0 and less than 1, got {self.beta}")
        if self.forward == self.reverse == self.jsd == 0:
            raise ValueError("expected a weight that is not 0 among forward, reverse and jsd, got none")

    @classmethod
    def forward_kl(cls) -> Divergence:
        """KL(q || p), from the teacher to the student."""
        return cls(forward=1.0)

    @classmethod
    def reverse_kl(cls) -> Divergence:
        """KL(p || q), from the student to the teacher."""
        return cls(reverse=1.0)

    @classmethod
    def mixed_kl(cls, alpha: float) -> Divergence:
        """`alpha * KL(q || p) + (1 - alpha) * KL(p || q)`."""
        check_finite("alpha", alpha)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be 0 to 1, got {alpha}")
        return cls(forward=alpha, reverse=1 - alpha)

    @classmethod
    def generalized_jsd(cls, beta: float = 0.5) -> Divergence:
        """The JSD of GKD; with 0.5 the usual one."""
        return cls(jsd=1.0, beta=beta)

    @property
    def fields(self) -> int:
        """How many sums each block has: that of p - q, one for each KL, and two for the JSD."""
        return 1 + (self.forward > 0) + (self.reverse > 0) + 2 * (self.jsd > 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair:
    """What is compared, and how."""

    student: Softmax
    """Over the vocabulary, with this rank's columns."""
    teacher: Softmax
    """The same columns, with the teacher's own way from products to logits."""
    divergence: Divergence
    """What is computed of the two."""


class TokenDivergence(NamedTuple):
    """Of each token, over the whole vocabulary: [tokens] float32 each."""

    top: Tensor
    """The student's largest logit. This and all other fields are 0 for a token that does not count."""
    log_sum: Tensor
    """log of the sum of exp(z - top)."""
    teacher_top: Tensor
    """As `top`, of the teacher."""
    teacher_log_sum: Tensor
    """As `log_sum`, of the teacher."""
    shift: Tensor
    """Difference of the two log_sums, teacher less student."""
    correction: Tensor
    """What the difference d of the log-probs has too much with this shift, for all elements alike."""
    value: Tensor
    """The divergence."""
    reverse: Tensor
    """KL(p || q); 0 where it has no weight."""
    to_mixture: Tensor
    """KL(p || m); 0 where the JSD has no weight."""


def has_labels(vectors: Tensor) -> bool:
    """Whether the vectors are also for the labels' log-probs."""
    return len(vectors) > DIVERGENCE_FIELDS


def psi(t: Tensor) -> Tensor:
    """exp(t) - 1 - t of |t| < 1, to a few units in the last place."""
    series = torch.full_like(t, 1 / 39916800)
    for divisor in (3628800, 362880, 40320, 5040, 720, 120, 24, 6, 2):
        series = series * t + 1 / divisor
    return t * t * series


def log_probs(raw: Tensor, softmax: Softmax, inverse_temperature: Tensor, top: Tensor, log_sum: Tensor) -> Tensor:
    """Of products [tokens, columns]; the rest are [tokens]."""
    return softmax.logits(raw, inverse_temperature) - top[:, None] - log_sum[:, None]


def differences(raw: Tensor, teacher_raw: Tensor, pair: Pair, vectors: Tensor) -> Tensor:
    """d = log q - log p, from logits instead of log-probs: close logits have an exact difference.

    Where neither model finds a token possible it is NaN. What is made of it looks at the probabilities, which are 0.

    Args:
        raw: [tokens, columns] float32, the student's products.
        teacher_raw: [tokens, columns] float32.
        pair: how they become logits.
        vectors: as for `block_sums`; more rows do not matter.
    """
    top, _, inverse_temperature, teacher_top, _, shift = vectors[:6]
    z = pair.student.logits(raw, inverse_temperature)
    y = pair.teacher.logits(teacher_raw, inverse_temperature)
    # One after the other: beside logits far from zero, their sum would lose the digits of the shift.
    return ((y - z) - (teacher_top - top)[:, None]) - shift[:, None]


def log_ratio_of_mixture(d: Tensor, part: float, rest: float) -> Tensor:
    """log(part exp(d) + rest), where `part` and `rest` are positive and add up to 1."""
    inside = d.clamp(-FAR, FAR)
    excess = part * torch.expm1(inside)
    # What 1 + excess leaves of a small ratio is the rounding of the excess.
    log = torch.where(excess < -0.5, torch.log(part * inside.exp() + rest), excess.log1p())
    return log + (d - FAR).clamp(min=0)


def _times(probability: Tensor, x: Tensor) -> Tensor:
    """The product, 0 where the probability is, however infinite `x` is."""
    return torch.where(probability == 0, 0.0, probability * x)


def divergence_terms(log_p: Tensor, log_q: Tensor, d: Tensor, divergence: Divergence) -> list[Tensor]:
    """What is summed over the vocabulary, in the order of the fields."""
    p, q, near = log_p.exp(), log_q.exp(), d.abs() < 1
    excess = torch.where(near, q * torch.expm1(-d), p - q)
    terms = [excess]
    if divergence.forward > 0:
        terms.append(torch.where(near, q * psi(-d), excess + _times(q, d)))
    if divergence.reverse > 0:
        terms.append(torch.where(near, p * psi(d), -excess - _times(p, d)))
    if divergence.jsd > 0:
        beta = divergence.beta
        of_teacher, of_student = log_ratio_of_mixture(-d, 1 - beta, beta), log_ratio_of_mixture(d, beta, 1 - beta)
        far = (1 - beta) * excess - _times(q, of_teacher)
        terms.append(torch.where(of_teacher.abs() < 1, q * psi(of_teacher), far))
        far = -beta * excess - _times(p, of_student)
        terms.append(torch.where(of_student.abs() < 1, p * psi(of_student), far))
    return terms


def sums_torch(raw: Tensor, teacher_raw: Tensor, vectors: Tensor, pair: Pair) -> Tensor:
    """The definition of `block_sums`, in torch operators."""
    top, log_sum, inverse_temperature, teacher_top, teacher_log_sum, _ = vectors
    log_p = log_probs(raw, pair.student, inverse_temperature, top, log_sum)
    log_q = log_probs(teacher_raw, pair.teacher, inverse_temperature, teacher_top, teacher_log_sum)
    d = differences(raw, teacher_raw, pair, vectors)
    tokens, columns = raw.shape
    blocks = -(-columns // BLOCK)
    valid = torch.arange(columns, device=raw.device) < pair.student.shard.valid_columns
    sums = raw.new_empty(blocks, pair.divergence.fields, tokens)
    for field, term in enumerate(divergence_terms(log_p, log_q, d, pair.divergence)):
        room = raw.new_zeros(tokens, blocks * BLOCK)
        room[:, :columns] = torch.where(valid, term, 0.0)
        sums[:, field] = room.view(tokens, blocks, BLOCK).sum(2).t()
    return sums


def finish(sums: Tensor, divergence: Divergence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fields `correction`, `value`, `reverse` and `to_mixture` of `TokenDivergence`.

    Args:
        sums: [fields, tokens] float64, over the whole vocabulary.
        divergence: what they are sums for.
    """
    excess, rest = sums[0], list(sums[1:])
    c = -excess.log1p()
    value = reverse = to_mixture = torch.zeros_like(c)
    if divergence.forward > 0:
        value = divergence.forward * (rest.pop(0) - (excess + c)).clamp(min=0)
    if divergence.reverse > 0:
        reverse = (rest.pop(0) - (c.expm1() - c)).clamp(min=0)
        value = value + divergence.reverse * reverse
    if divergence.jsd > 0:
        beta, half = divergence.beta, c.square() / 2
        of_teacher = (rest.pop(0) - (1 - beta) ** 2 * half).clamp(min=0)
        to_mixture = (rest.pop(0) - beta**2 * half).clamp(min=0)
        value = value + divergence.jsd * (beta * of_teacher + (1 - beta) * to_mixture)
    return c.float(), value.float(), reverse.float(), to_mixture.float()
