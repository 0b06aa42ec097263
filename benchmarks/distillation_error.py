"""Errors of a divergence and its gradient close to the teacher, against float64, on the CPU.

    python benchmarks/distillation_error.py

The student's hidden states are the teacher's with a relative change of about `change`. The rival takes two fp32
`log_softmax` of fp32 products and `torch.nn.functional.kl_div`, with autograd's gradient. With exact products (hidden
states and weights of few bits) what remains is the error of the divergence itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs.distillation import linear_distillation
from megatron_fp32.ops.logprobs.divergence import Divergence

TOKENS, VOCAB = 64, 8192
DIVERGENCES = {
    "forward KL": Divergence.forward_kl(),
    "reverse KL": Divergence.reverse_kl(),
    "JSD": Divergence.generalized_jsd(),
}


def exact_products(change: float) -> tuple[Tensor, Tensor, Tensor]:
    """Student's and teacher's hidden states, and the weight of both."""
    x, w = torch.randint(-64, 65, (TOKENS, 8)) / 16, torch.randint(-16, 17, (VOCAB, 8)) / 16
    step = 2.0 ** round(math.log2(change))
    return x, x + torch.randint(-2, 3, x.shape) * step, w


def fp32_products(change: float) -> tuple[Tensor, Tensor, Tensor]:
    x, w = torch.randn(TOKENS, 256) * 3, torch.randn(VOCAB, 256) / 16
    return x, x * (1 + change * torch.randn(x.shape)), w


def by_formula(z: Tensor, y: Tensor, divergence: Divergence) -> Tensor:
    """From logits, in their dtype."""
    log_p, log_q = z.log_softmax(1), y.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return kl_div(b, a, reduction="none", log_target=True).sum(1)

    jsd = (kl(log_q, log_m) + kl(log_p, log_m)) / 2
    return divergence.forward * kl(log_q, log_p) + divergence.reverse * kl(log_p, log_q) + divergence.jsd * jsd


def errors(x: Tensor, t: Tensor, w: Tensor, divergence: Divergence) -> str:
    """The mean divergence, then for the operator and its rival the relative errors of the values and of dX."""
    upstream = torch.randn(TOKENS)

    def result(way: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = x.to(dtype).clone().requires_grad_()
        value = way(leaf)
        value.backward(upstream.to(dtype))
        assert leaf.grad is not None
        return value.detach(), leaf.grad

    truth = result(lambda x: by_formula(x @ w.double().t(), t.double() @ w.double().t(), divergence), torch.float64)
    ours = result(lambda x: linear_distillation(x, w, t, w, divergence=divergence).divergence, torch.float32)
    rival = result(lambda x: by_formula(x @ w.t(), t @ w.t(), divergence), torch.float32)
    found = [relative_error(a, b) for way in (ours, rival) for a, b in zip(way, truth, strict=True)]
    return f"{truth[0].mean():.1e} | " + " | ".join(f"{error:.0e}" for error in found)


def main() -> None:
    print("products | change | divergence | mean | value | dX | rival's value | rival's dX")
    for problem in (exact_products, fp32_products):
        for change in (1e-2, 1e-3, 1e-4):
            for name, divergence in DIVERGENCES.items():
                torch.manual_seed(0)
                print(f"{problem.__name__} | {change:g} | {name} | {errors(*problem(change), divergence)}")


if __name__ == "__main__":
    main()
