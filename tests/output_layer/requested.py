"""Models, requests of their results, and what the results are in float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from megatron_fp32.apply import apply_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.output_layer.requests import (
    LogprobsRequest,
    SelectedLogprobsRequest,
    TopLogprobsRequest,
    TruncatedLogprobsRequest,
    WeightedLossRequest,
)
from tests.output_layer.layers import LENGTH, VOCAB, fill, gpt, hybrid

EXACT = Fp32Config(gated_delta_net=(), grad_precision="bf16x3")
FUSED = Fp32Config(gated_delta_net=(), grad_precision="bf16x3", fused_loss="recompute")
MODELS: dict[str, Callable[[], Any]] = {
    "gpt": gpt,
    "tied": functools.partial(gpt, tied=True),
    "mtp": functools.partial(gpt, mtp=2),
    "hybrid": hybrid,
}
Exact = Callable[[Tensor, Tensor], tuple[Any, ...]]


def drawn(*shape: int) -> Tensor:
    return torch.rand(2, LENGTH, *shape, generator=torch.Generator().manual_seed(1))


def of_labels() -> tuple[Any, Exact]:
    temperature = drawn() + 0.5

    def exact(logits: Tensor, labels: Tensor) -> tuple[Any, ...]:
        logits = logits / temperature.double()[..., None]
        logp = logits.log_softmax(-1)
        top = logp.topk(3)
        label = logp.gather(2, labels[..., None])[..., 0]
        entropy = -(logp.exp() * logp).sum(-1)
        return label, entropy, logits.logsumexp(-1), logits.mean(-1), top.values.detach(), top.indices

    return LogprobsRequest(temperature=temperature, top_k=3, mean_logit=True, backward="saved"), exact


def selected(logits: Tensor, tokens: Tensor) -> tuple[Any, ...]:
    logp = logits.log_softmax(-1)
    chosen = torch.zeros_like(logits).scatter(2, tokens, 1.0).bool()
    rest = logp.masked_fill(chosen, -torch.inf).logsumexp(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(2, tokens), logits.gather(2, tokens), tokens, rest, entropy, logits.logsumexp(-1)


def of_tokens() -> tuple[Any, Exact]:
    tokens = drawn(VOCAB).argsort(-1)[..., :4]
    return SelectedLogprobsRequest(tokens=tokens), lambda logits, labels: selected(logits, tokens)


def of_top() -> tuple[Any, Exact]:
    return TopLogprobsRequest(k=5, temperature=0.7), lambda logits, labels: selected(
        logits / 0.7, logits.topk(5).indices
    )


def truncated(logits: Tensor, labels: Tensor, kept: Tensor) -> tuple[Any, ...]:
    kept = kept.scatter(2, labels[..., None], True)
    logp = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    entropy = -(logp.exp() * logp.masked_fill(~kept, 0.0)).sum(-1)
    mass = logits.log_softmax(-1).masked_fill(~kept, -torch.inf).logsumexp(-1)
    return logp.gather(2, labels[..., None])[..., 0], entropy, mass.detach()


def of_kept_tokens() -> tuple[Any, Exact]:
    tokens = drawn(VOCAB).argsort(-1)[..., :6]

    def exact(logits: Tensor, labels: Tensor) -> tuple[Any, ...]:
        return truncated(logits, labels, torch.zeros_like(logits, dtype=torch.bool).scatter(2, tokens, True))

    return TruncatedLogprobsRequest(kept_tokens=tokens), exact


def of_threshold() -> tuple[Any, Exact]:
    # Below the mean probability, also where all of them are almost equal.
    least = torch.full((2, LENGTH), -math.log(VOCAB))

    def exact(logits: Tensor, labels: Tensor) -> tuple[Any, ...]:
        return truncated(logits, labels, logits.log_softmax(-1) >= least[..., None])

    return TruncatedLogprobsRequest(min_logprob=least), exact


def of_weights() -> tuple[Any, Exact]:
    weights = drawn()

    def exact(logits: Tensor, labels: Tensor) -> tuple[Any, ...]:
        losses = -logits.log_softmax(-1).gather(2, labels[..., None])[..., 0]
        return (losses * weights).sum(), losses.detach()

    return WeightedLossRequest(loss_weights=weights, grad_scale=0.25), exact


REQUESTS = {
    "labels": of_labels, "tokens": of_tokens, "top": of_top, "kept": of_kept_tokens, "threshold": of_threshold,
    "weights": of_weights,
}  # fmt: skip


def built(name: str, config: Fp32Config = EXACT) -> tuple[Any, list[Tensor]]:
    """A model, and where its output layer's inputs are recorded; the last one is the model's own."""
    MTPLossLoggingHelper.tracker = {}
    model = MODELS[name]()
    fill(model)
    apply_fp32(model, config, weights="initialized")
    seen: list[Tensor] = []
    model.output_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    return model, seen


def weight_of(model: Any) -> Tensor:
    weight: Tensor | None = model.output_layer.weight
    return model.shared_embedding_or_output_weight() if weight is None else weight  # type: ignore[no-any-return]


def total_of(results: Any) -> Tensor:
    """A sum with random cotangents; a weighted loss has one cotangent only, its grad_scale."""
    if len(results) == 2:
        return results[0] * 0.25  # type: ignore[no-any-return]
    torch.manual_seed(7)
    return sum((x * torch.randn(x.shape)).sum() for x in results if x.requires_grad)  # type: ignore[return-value]
