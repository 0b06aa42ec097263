"""The loss of a Megatron model without its logits.

megatron-core's models call the output layer, may scale or transpose the logits, and pass them to
`compute_language_model_loss`. Multi-token prediction does this once more for every depth. With `Fp32Config.fused_loss`
the output layer returns `DeferredLogits` instead of logits, and the model's `compute_language_model_loss` calls
`DeferredLogits.loss`. This works for GPTModel, HybridModel, multi-token prediction and the schedule that overlaps
communication, in every release from 0.16 on, and replaces one method on the instance. `output_processor`, which
GPTModel has from 0.18 on, works neither for multi-token prediction nor for HybridModel.

For the loss, the output layer is called a second time, because Megatron-FSDP's hooks gather its parameters around every
call. Other forward hooks only run in the first call, where they get `DeferredLogits`.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor, nn

from megatron_fp32.config import Fp32Config
from megatron_fp32.kept_parameters.fp32_calls import count_fp32_call
from megatron_fp32.ops.logprobs import LogitsTransform, linear_cross_entropy, linear_logprobs
from megatron_fp32.ops.products.ranks import gather_first_dim

Use = Callable[[Any, Tensor, Tensor | None], Any]
"""A function of output layer, hidden states and weight, whose result the layer returns instead of logits."""


class DeferredLogits:
    """Logits that are not computed yet: hidden states, a weight and a scale.

    - Multiplication with a number (MuP) only changes the scale.
    - `transpose`, which a model without labels calls, computes the logits.
    - `max`, `size` and `torch.argmax`, which multi-token prediction calls for its acceptance rate, do not.
    - Everything else raises.
    """

    def __init__(self, layer: nn.Module, hidden: Tensor, weight: Tensor | None, scale: float = 1.0) -> None:
        self._layer, self._hidden, self._weight, self._scale = layer, hidden, weight, scale

    def loss(self, labels: Tensor) -> Tensor:
        """Loss of every token, [b, s] float32, for labels [b, s]."""
        return self._use(_loss(labels.t().contiguous(), self._scale)).t().contiguous()

    def logits(self) -> Tensor:
        """Compute the logits, [s, b, vocab / tp] float32."""
        logits = self._use(_logits)
        return logits if self._scale == 1.0 else logits * self._scale

    def __mul__(self, factor: float) -> DeferredLogits:
        if not isinstance(factor, (int, float)):
            raise TypeError(f"logits that are not computed yet can be scaled by a number, got {type(factor).__name__}")
        return self._with_scale(self._scale * factor)

    def __rmul__(self, factor: float) -> DeferredLogits:
        return self * factor

    def _with_scale(self, scale: float) -> DeferredLogits:
        return DeferredLogits(self._layer, self._hidden, self._weight, scale)

    def transpose(self, first: int, second: int) -> Tensor:
        """Compute the logits and transpose them."""
        return self.logits().transpose(first, second)

    def size(self, dim: int) -> int:
        """The size of the last dimension, vocab / tp. Raises TypeError for another dimension."""
        if dim != -1:
            raise TypeError(f"only size(-1) is known of logits that are not computed yet, got size({dim})")
        return int(self._layer.output_size_per_partition)  # type: ignore[arg-type]

    def max(self, dim: int) -> tuple[Tensor, Tensor]:
        """The largest of this rank's logits and its column, [s, b] each, without a gradient.

        Raises TypeError for a dimension other than -1.
        """
        if dim != -1:
            raise TypeError(f"only max(-1) is known of logits that are not computed yet, got max({dim})")
        with torch.no_grad():
            return self._use(_maximum(self._scale))  # type: ignore[no-any-return]

    def _use(self, use: Use) -> Any:
        with _gathering_hooks_alone(self._layer):
            return self._layer(self._hidden, weight=self._weight, use=use)

    @classmethod
    def __torch_function__(cls, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.argmax:
            return args[0].max(dim=(kwargs or {}).get("dim", args[1] if len(args) > 1 else None))[1]
        raise TypeError(_refusal(f"torch.{getattr(function, '__name__', function)}"))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(_refusal(name))

    def __reduce__(self) -> Any:
        raise TypeError(_refusal("pickle"))


@contextlib.contextmanager
def _gathering_hooks_alone(layer: nn.Module) -> Iterator[None]:
    """Turn off all forward hooks except Megatron-FSDP's in the block: the call that returned `self` has run them."""
    before = {name: vars(layer)[name] for name in ("_forward_pre_hooks", "_forward_hooks")}
    for name, hooks in before.items():
        vars(layer)[name] = type(hooks)((key, hook) for key, hook in hooks.items() if _is_fsdp_hook(hook))
    try:
        yield
    finally:
        vars(layer).update(before)


def _is_fsdp_hook(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return "fsdp" in (getattr(hook, "__module__", None) or "")


def _refusal(what: str) -> str:
    return (
        f"{what} needs logits, but Fp32Config(fused_loss=...) computes the loss without them: call "
        "DeferredLogits.logits() to compute them, or turn fused_loss off"
    )


def _logits(layer: Any, hidden: Tensor, weight: Tensor | None) -> Tensor:
    logits: Tensor = layer.compute_logits(hidden, weight, None)[0]
    return logits


def _loss(labels: Tensor, scale: float) -> Use:
    def use(layer: Any, hidden: Tensor, weight: Tensor | None) -> Tensor:
        count_fp32_call(layer)
        return linear_cross_entropy(
            hidden,
            layer.choose_and_mark_weight(weight),
            labels,
            logits_transform=LogitsTransform(scale=scale),
            backward=layer.fp32_config.fused_loss,
            **layer.operator_arguments(),
        )

    return use


def _maximum(scale: float) -> Use:
    def use(layer: Any, hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = layer.choose_and_mark_weight(weight)
        gathered = hidden.shape[0] * (layer.tp_group.size() if layer.sequence_parallel else 1)
        labels = torch.zeros(gathered, *hidden.shape[1:-1], dtype=torch.long, device=hidden.device)
        # This rank's columns are treated as a whole vocabulary.
        if layer.sequence_parallel:
            hidden = gather_first_dim(hidden, layer.tp_group)
        top = linear_logprobs(hidden, weight, labels, logits_transform=LogitsTransform(scale=scale), top_k=1)
        assert top.top_logprobs is not None
        assert top.top_tokens is not None
        return top.top_logprobs[..., 0] + top.logsumexp, top.top_tokens[..., 0]

    return use


def check_owner(name: str, owner: nn.Module, config: Fp32Config) -> None:
    """Raise ValueError if the model around the output layer `name` cannot use `DeferredLogits`."""
    if config.fused_loss == "off":
        return
    wrapped = not name.endswith("output_layer")
    if wrapped or not isinstance(owner, LanguageModule):
        what = "is wrapped by a LoRA layer" if wrapped else f"belongs to a {type(owner).__name__}, not a LanguageModule"
        raise ValueError(f"fused_loss needs the output layer of a megatron-core language model: {name} {what}")
    own = "compute_language_model_loss" in vars(owner) and not has_fused_loss(owner)
    if own or type(owner).compute_language_model_loss is not LanguageModule.compute_language_model_loss:
        raise ValueError(
            f"fused_loss replaces compute_language_model_loss, but this {type(owner).__name__} has its own: everything "
            "that its compute_language_model_loss adds to the loss would be lost"
        )


def set_fused_loss(owner: Any, config: Fp32Config) -> None:
    """Replace the model's `compute_language_model_loss` if `fused_loss` is on; otherwise put the original back."""
    if config.fused_loss != "off":
        owner.compute_language_model_loss = types.MethodType(_compute_language_model_loss, owner)
    elif has_fused_loss(owner):
        del owner.compute_language_model_loss


def has_fused_loss(owner: Any) -> bool:
    """Whether `set_fused_loss` has replaced this model's `compute_language_model_loss`."""
    own = vars(owner).get("compute_language_model_loss")
    return getattr(own, "__func__", None) is _compute_language_model_loss


def _compute_language_model_loss(self: LanguageModule, labels: Tensor, logits: Any) -> Tensor:
    if isinstance(logits, DeferredLogits):
        return logits.loss(labels)
    return type(self).compute_language_model_loss(self, labels, logits)
