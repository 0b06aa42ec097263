"""Problems for the operators of `ops/logprobs`, and their truth in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import LogitsTransform, VocabParallel
from megatron_fp32.ops.logprobs.reference import LogprobsReference, logprobs_reference
from megatron_fp32.ops.logprobs.softmax import Softmax
from megatron_fp32.ops.products.shard import Shard

TOKENS, HIDDEN, ROWS, VOCAB = 150, 96, 700, 650  # nothing that a tile or a block divides; the last 50 rows are padding

PADDED = VocabParallel(vocab_size=VOCAB)
BENT: dict[str, Any] = {"vocab_size": VOCAB, "softcap": 5.0, "scale": 1.3, "temperature": 0.7}
"""Everything that changes the logits, as `logprobs_reference` takes it."""


def grouped(options: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the operators, from options that are named as the fields of their groups or the arguments are."""
    rest = dict(options)
    groups: dict[str, type] = {"vocab_parallel": VocabParallel, "logits_transform": LogitsTransform}
    for argument, kind in groups.items():
        names = {field.name for field in dataclasses.fields(kind)} & set(rest)
        if names:
            rest[argument] = kind(**{name: rest.pop(name) for name in names})
    return rest


def softmax(columns: int, **changes: Any) -> Softmax:
    """Of one rank without padding, unless the fields say otherwise."""
    shard = {"group": None, "first_column": 0, "valid_columns": columns, "vocab_size": columns}
    transform = {"scale": 1.0, "softcap": None}
    for fields in (shard, transform):
        fields |= {name: changes.pop(name) for name in list(changes) if name in fields}
    return Softmax(
        **({"ignore_index": -100, "invariant": False} | changes),  # type: ignore[arg-type]
        shard=Shard(**shard),  # type: ignore[arg-type]
        transform=LogitsTransform(**transform),  # type: ignore[arg-type]
    )


@dataclasses.dataclass(kw_only=True)
class Case:
    """Operands of one call."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor

    def copy(self, **changes: Any) -> Case:
        """Leaves of their own, without gradients."""
        leaves = {"hidden": self.hidden.detach().clone(), "weight": self.weight.detach().clone(), "labels": self.labels}
        leaves |= changes
        return Case(
            hidden=leaves["hidden"].requires_grad_(), weight=leaves["weight"].requires_grad_(), labels=leaves["labels"]
        )

    def truth(self, upstream: list[Tensor] | None = None, **options: Any) -> tuple[LogprobsReference, Tensor, Tensor]:
        """All outputs in float64, and dX and dW for these upstream gradients of log-prob, entropy, logsumexp, mean."""
        x, w = self.hidden.detach().double().requires_grad_(), self.weight.detach().double().requires_grad_()
        out = logprobs_reference(x, w, self.labels, **options)
        if upstream is not None:
            sum((a * b.double()).sum() for a, b in zip(out[1:], upstream, strict=False)).backward()
        detached = LogprobsReference(*(field.detach() for field in out))
        zero = torch.zeros((), dtype=torch.float64)
        return detached, zero if x.grad is None else x.grad, zero if w.grad is None else w.grad


def case(dtype: torch.dtype = torch.bfloat16, *, device: str = "cpu", spread: float = 3.0, seed: int = 0) -> Case:
    """Logits of about `spread`; token 3 is ignored, token 5 has the first and token 7 the last word as its label."""
    torch.manual_seed(seed)
    hidden = (torch.randn(TOKENS, HIDDEN) * spread).to(dtype).to(device).requires_grad_()
    weight = (torch.randn(ROWS, HIDDEN) / HIDDEN**0.5).to(dtype).to(device).requires_grad_()
    labels = torch.randint(VOCAB, (TOKENS,)).to(device)
    labels[3], labels[5], labels[7] = -100, 0, VOCAB - 1
    return Case(hidden=hidden, weight=weight, labels=labels)


def exact_logits(c: Case, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Leaves for hidden states and weight, and logits [tokens, vocab] of them in float64; options as in `BENT`.

    A `bias` among them is added as it is, so that it may be a leaf, too.
    """
    x, w = c.hidden.detach().double().requires_grad_(), c.weight.detach().double().requires_grad_()
    z = (x @ w.t() + options.get("bias", 0.0))[:, : options.get("vocab_size")] * options.get("scale", 1.0)
    if options.get("softcap"):
        z = options["softcap"] * torch.tanh(z / options["softcap"])
    return x, w, z / options.get("temperature", 1.0)


def with_main_grad(weight: Tensor) -> Tensor:
    """Give the weight what Megatron's DistributedDataParallel gives it."""
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
    weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    return weight


def rounded_error(exact: Tensor, dtype: torch.dtype) -> float:
    """The error of rounding the truth once."""
    return relative_error(exact.to(dtype), exact)
