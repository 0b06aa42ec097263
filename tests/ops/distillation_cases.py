"""Problems for `linear_distillation`, and their truth in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.ops.logprobs.distillation import Distillation, linear_distillation
from megatron_fp32.ops.logprobs.divergence import Divergence

TOKENS, HIDDEN, TEACHER_HIDDEN, ROWS, VOCAB = 70, 96, 40, 700, 650  # the last 50 rows of the weights are padding

DIVERGENCES = {
    "forward": Divergence.forward_kl(),
    "reverse": Divergence.reverse_kl(),
    "mixed": Divergence.mixed_kl(0.3),
    "jsd": Divergence.generalized_jsd(),
    "jsd of 0.1": Divergence.generalized_jsd(0.1),
    "jsd of 0.9": Divergence.generalized_jsd(0.9),
    "all": Divergence(forward=0.5, reverse=2.0, jsd=3.0, beta=0.3),
}


def definition(z: Tensor, y: Tensor, divergence: Divergence) -> Tensor:
    """[tokens], from the student's and the teacher's logits in float64, as the formulas are written."""
    log_p, log_q = z.log_softmax(1), y.log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    m = divergence.beta * q + (1 - divergence.beta) * p

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        return torch.where(a == 0, 0.0, a * (log_a - log_b)).sum(1)

    parts = (
        (divergence.forward, lambda: kl(q, log_q, log_p)),
        (divergence.reverse, lambda: kl(p, log_p, log_q)),
        (divergence.jsd * divergence.beta, lambda: kl(q, log_q, m.log())),
        (divergence.jsd * (1 - divergence.beta), lambda: kl(p, log_p, m.log())),
    )
    return sum((weight * part() for weight, part in parts if weight), z.new_zeros(len(z)))


def logits(
    hidden: Tensor, weight: Tensor, *, vocab: int, temperature: float | Tensor, scale: float, softcap: float | None
) -> Tensor:
    """In float64."""
    found = hidden.double() @ weight.double()[:vocab].t() * scale
    found = found if softcap is None else softcap * torch.tanh(found / softcap)
    return found / (temperature.double().reshape(-1, 1) if isinstance(temperature, Tensor) else temperature)


def harmless(temperature: float | Tensor, labels: Tensor) -> float | Tensor:
    """With a 1 for tokens that do not count: autograd would multiply a gradient of 0 by a NaN."""
    return torch.where(labels == -100, 1.0, temperature) if isinstance(temperature, Tensor) else temperature


@dataclasses.dataclass(kw_only=True)
class Case:
    """Operands of one call, [tokens, ...]."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    vocab: int = VOCAB

    def copy(self) -> Case:
        """Tensors of their own; the student's are leaves."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        found = Case(**{k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in fields.items()})
        found.hidden.requires_grad_()
        found.weight.requires_grad_()
        return found

    def run(self, divergence: Divergence, **options: Any) -> Distillation:
        """The operator on all of this."""
        operands = (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight)
        return linear_distillation(*operands, divergence=divergence, **options)

    def truth(
        self, divergence: Divergence, upstream: Tensor, of_logprobs: Tensor | None = None, *,
        temperature: float | Tensor = 1.0, label_temperature: float | Tensor = 1.0,
        student: tuple[float, float | None] = (1.0, None), teacher: tuple[float, float | None] = (1.0, None),
    ) -> tuple[Distillation, Tensor, Tensor]:  # fmt: skip
        """Outputs, dX and dW, for these upstream gradients; the labels decide which tokens count."""
        x, w = self.hidden.detach().double().requires_grad_(), self.weight.detach().double().requires_grad_()
        temperature, label_temperature = (harmless(t, self.labels) for t in (temperature, label_temperature))
        shape: dict[str, Any] = {"vocab": self.vocab, "scale": student[0], "softcap": student[1]}
        z = logits(x, w, temperature=temperature, **shape)
        shape = {"vocab": self.vocab, "scale": teacher[0], "softcap": teacher[1]}
        y = logits(self.teacher_hidden, self.teacher_weight, temperature=temperature, **shape)
        counts = self.labels != -100
        value = torch.where(counts, definition(z, y, divergence), 0.0)
        shape = {"vocab": self.vocab, "scale": student[0], "softcap": student[1]}
        own = logits(x, w, temperature=label_temperature, **shape).log_softmax(1)
        logprobs = torch.where(counts, own.gather(1, self.labels.clamp(min=0)[:, None])[:, 0], 0.0)
        total = (value * upstream.double()).sum()
        if of_logprobs is not None:
            total = total + (logprobs * of_logprobs.double()).sum()
        total.backward()
        entropies = (torch.where(counts, torch.special.entr(a.softmax(1)).sum(1), 0.0) for a in (z, y))
        outputs = Distillation(value.detach(), logprobs.detach(), *(e.detach() for e in entropies))
        assert x.grad is not None
        assert w.grad is not None
        return outputs, x.grad, w.grad


def case(dtype: torch.dtype = torch.float32, *, device: str = "cpu", spread: float = 3.0, seed: int = 0) -> Case:
    """Two models that have nothing in common; token 3 does not count, token 7 has the last word as its label."""
    torch.manual_seed(seed)
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[3], labels[5], labels[7] = -100, 0, VOCAB - 1
    found = Case(
        hidden=(torch.randn(TOKENS, HIDDEN) * spread).to(dtype),
        weight=(torch.randn(ROWS, HIDDEN) / HIDDEN**0.5).to(dtype),
        teacher_hidden=(torch.randn(TOKENS, TEACHER_HIDDEN) * spread).to(dtype),
        teacher_weight=(torch.randn(ROWS, TEACHER_HIDDEN) / TEACHER_HIDDEN**0.5).to(dtype),
        labels=labels,
    )
    fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return Case(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in fields.items()}).copy()


def close_case(step: int, *, device: str = "cpu", seed: int = 0) -> Case:
    """A student whose hidden states are a few times 2^-step from its teacher's, and products without rounding."""
    torch.manual_seed(seed)
    tokens, hidden, vocab = 40, 8, 900
    x, w = torch.randint(-64, 65, (tokens, hidden)) / 16, torch.randint(-16, 17, (vocab, hidden)) / 16
    t = x + torch.randint(-2, 3, (tokens, hidden)) * 2.0**-step
    labels = torch.randint(vocab, (tokens,))
    x, w, t, labels = (a.to(device) for a in (x, w, t, labels))
    return Case(hidden=x, weight=w, teacher_hidden=t, teacher_weight=w, labels=labels, vocab=vocab).copy()


def case_of_logits(z: Tensor, y: Tensor) -> Case:
    """Of finite logits [tokens, vocab]: they are the hidden states, and the weights are unit matrices."""
    unit = torch.eye(z.shape[1])
    labels = torch.zeros(len(z), dtype=torch.long)
    return Case(
        hidden=z, weight=unit, teacher_hidden=y, teacher_weight=unit, labels=labels, vocab=z.shape[1]
    ).copy()  # fmt: skip
