"""What an output layer can return instead of logits: one class for each operator of `ops.logprobs`."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from megatron_fp32.kept_parameters.fp32_calls import count_fp32_call
from megatron_fp32.ops.logprobs import (
    LogitsTransform,
    Logprobs,
    SelectedLogprobs,
    TruncatedLogprobs,
    WeightedLoss,
    linear_logprobs,
    linear_selected_logprobs,
    linear_top_logprobs,
    linear_truncated_logprobs,
    weighted_cross_entropy,
)
from megatron_fp32.ops.logprobs.options import Backward
from megatron_fp32.output_layer.layer import Fp32OutputLayer
from megatron_fp32.validation import check_choice, check_count, check_flag


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """Base class of the requests. Tensors begin with [b, s], as the model's labels do."""

    temperature: float | Tensor = 1.0
    """A positive number, or a tensor of positive numbers that broadcasts to [b, s]: [b, 1] has one number for every
    sequence, [b, s] one for every token."""
    chunk_size: int | None = None
    """Tokens whose logits are in memory at once; None for as many as fit the workspace."""

    needs_labels: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)
        if isinstance(self.temperature, Tensor) and self.temperature.dim() > 2:
            raise ValueError(f"temperature must broadcast to [b, s], got {tuple(self.temperature.shape)}")

    def compute(
        self, layer: Fp32OutputLayer, hidden: Tensor, weight: Tensor | None, labels: Tensor | None, scale: float
    ) -> Any:
        """The operator's result, with [b, s] first.

        Args:
            layer: the output layer.
            hidden: [s, b, hidden], or [s / tp, b, hidden] with sequence parallelism.
            weight: as in `Fp32OutputLayer.forward`.
            labels: [b, s], or None.
            scale: of the logits.
        """
        count_fp32_call(layer)
        temperature = self.temperature
        return self._operator(
            hidden,
            layer.choose_and_mark_weight(weight),
            None if labels is None else sequence_first(labels),
            temperature=torch.atleast_2d(temperature).t() if isinstance(temperature, Tensor) else temperature,
            logits_transform=LogitsTransform(scale=scale),
            chunk_size=self.chunk_size,
            **layer.operator_arguments(),
        )

    def _operator(self, hidden: Tensor, weight: Tensor, labels: Any, **options: Any) -> Any:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LogprobsRequest(Request):
    """`Logprobs` of the labels that the model is called with: log-probs and entropy [b, s], top-k [b, s, top_k].

    The fields are arguments of `linear_logprobs`.

    Raises:
        TypeError: for a field of another type.
        ValueError: for a field with a value that is not allowed.
    """

    mean_logit: bool = False
    top_k: int = 0
    backward: Backward = "recompute"

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("mean_logit", self.mean_logit)
        check_count("top_k", self.top_k, least=0)
        check_choice("backward", self.backward, get_args(Backward))

    def _operator(self, hidden: Tensor, weight: Tensor, labels: Any, **options: Any) -> Logprobs:
        chosen: dict[str, Any] = {"mean_logit": self.mean_logit, "top_k": self.top_k, "backward": self.backward}
        return Logprobs(*_batch_first(linear_logprobs(hidden, weight, labels, **chosen, **options)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class SelectedLogprobsRequest(Request):
    """`SelectedLogprobs` of given tokens [b, s, K], such as those of a teacher; see `linear_selected_logprobs`.

    Raises:
        TypeError: for a field of another type.
        ValueError: for a field with a value that is not allowed.
    """

    tokens: Tensor
    """[b, s, K], integer; -100 for a slot without a token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_dimensions("tokens", self.tokens, "[b, s, K]")

    def _operator(self, hidden: Tensor, weight: Tensor, labels: Any, **options: Any) -> SelectedLogprobs:
        found = linear_selected_logprobs(hidden, weight, sequence_first(self.tokens), **options)
        return SelectedLogprobs(*_batch_first(found))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TopLogprobsRequest(Request):
    """`SelectedLogprobs` of the `k` most probable tokens, [b, s, k], with a gradient; see `linear_top_logprobs`.

    Raises:
        TypeError: for a field of another type.
        ValueError: for a field with a value that is not allowed.
    """

    k: int
    mask: Tensor | None = None
    """[b, s] bool: the positions that count; None for all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("k", self.k)
        if self.mask is not None:
            _check_dimensions("mask", self.mask, "[b, s]")

    def _operator(self, hidden: Tensor, weight: Tensor, labels: Any, **options: Any) -> SelectedLogprobs:
        mask = None if self.mask is None else sequence_first(self.mask)
        return SelectedLogprobs(*_batch_first(linear_top_logprobs(hidden, weight, self.k, mask=mask, **options)))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TruncatedLogprobsRequest(Request):
    """`TruncatedLogprobs` of the labels that the model is called with, over the tokens that a sampler kept, [b, s].

    See `linear_truncated_logprobs`. One of the two fields is given.

    Raises:
        TypeError: for a field of another type.
        ValueError: for a field with a value that is not allowed, and unless one of the two is given.
    """

    kept_tokens: Tensor | None = None
    """[b, s, K], integer; -100 fills positions with fewer tokens."""
    min_logprob: Tensor | None = None
    """[b, s]: the least log-prob that was kept."""

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.kept_tokens is None) == (self.min_logprob is None):
            raise ValueError("expected kept_tokens or min_logprob, and not both")
        if self.kept_tokens is not None:
            _check_dimensions("kept_tokens", self.kept_tokens, "[b, s, K]")
        if self.min_logprob is not None:
            _check_dimensions("min_logprob", self.min_logprob, "[b, s]")

    def _operator(self, hidden: Tensor, weight: Tensor, labels: Any, **options: Any) -> TruncatedLogprobs:
        kept, least = (None if x is None else sequence_first(x) for x in (self.kept_tokens, self.min_logprob))
        found = linear_truncated_logprobs(hidden, weight, labels, kept_tokens=kept, min_logprob=least, **options)
        return TruncatedLogprobs(*_batch_first(found))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class WeightedLossRequest(Request):
    """`WeightedLoss` of the labels that the model is called with, its gradients computed in the forward pass.

    `total` is what the loss function returns to Megatron's schedule; see `weighted_cross_entropy` for what that costs
    and refuses.

    Raises:
        TypeError: for a field of another type.
        ValueError: for a field with a value that is not allowed.
    """

    loss_weights: Tensor
    """[b, s]: the weight of each token's loss, such as the loss mask; without a gradient."""
    grad_scale: float | Tensor
    """The gradient that `total` will receive: the product of all factors that come after the loss function."""

    needs_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_dimensions("loss_weights", self.loss_weights, "[b, s]")

    def _operator(self, hidden: Tensor, weight: Tensor, labels: Any, **options: Any) -> WeightedLoss:
        weights = sequence_first(self.loss_weights)
        found = weighted_cross_entropy(hidden, weight, labels, weights, grad_scale=self.grad_scale, **options)
        return WeightedLoss(found.total, sequence_first(found.losses))


def sequence_first(x: Tensor) -> Tensor:
    """[b, s, ...] as [s, b, ...], or the other way round."""
    return x.transpose(0, 1).contiguous()


def _batch_first(results: Any) -> list[Any]:
    return [None if x is None else sequence_first(x) for x in results]


def _check_dimensions(name: str, value: object, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {shape}, got {value!r}")
    if value.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} must be a tensor {shape}, got {tuple(value.shape)}")
