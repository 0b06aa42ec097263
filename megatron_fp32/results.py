"""Results of the output layer out of a Megatron model's forward pass, in every release and every language model.

GPTModel has `output_processor` from 0.18 on, HybridModel and MambaModel do not have it. All of them call the output
layer, and then either `compute_language_model_loss` or `transpose` and `contiguous` on what it returned. In a block of
`returning`, the output layer returns `DeferredResults`, and these calls give the results. Multi-token prediction calls
the output layer before, once for every depth, and computes its losses from labels of its own, which tells its calls
from the model's.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from torch import Tensor, nn

from megatron_fp32.find_layers import (
    Model,
    find_output_layers,
    named_chunks,
    reasons_without_head,
    why_not_vocabulary_head,
)
from megatron_fp32.output_layer.fused_loss import DeferredLogits
from megatron_fp32.output_layer.layer import Fp32OutputLayer, check_plain_product
from megatron_fp32.output_layer.requests import Request


@contextlib.contextmanager
def returning(model: Model, request: Request) -> Iterator[None]:
    """In the block, the model's forward pass returns what was requested instead of logits or a loss.

    `with returning(model, LogprobsRequest(top_k=5)): results = Logprobs(*model(..., labels=labels))`. The model may be
    called more than once. Float16Module makes a plain tuple of the results, in the order of their fields. A pipeline
    stage without an output layer returns what it always does. With multi-token prediction the model computes the losses
    of the depths as before; pass it the labels that this takes.

    Only the model and its output layer are changed, and as they were after the block. Backward passes may come later.
    megatron-core's schedule plans (`build_schedule_plan`) run after the block, and raise: use `output_processor` there.

    Args:
        model: the model, wrapped or not, or a list of chunks, after `apply_fp32`.
        request: a `LogprobsRequest`, `SelectedLogprobsRequest`, `TopLogprobsRequest`, `TruncatedLogprobsRequest` or
            `WeightedLossRequest`.

    Raises:
        TypeError: when `request` is not a request, or the output layer is not an `Fp32OutputLayer`.
        ValueError: when the results would not be those of the model's logits (a bias, a LoRA wrapper, a subclass that
            changes logits), when there are several output layers, or none where there must be one. The forward pass
            raises it without labels where the request needs them, with an inference context, and where the operator
            raises it.
        RuntimeError: when the layer is in another block; when the model did not run in the block, or did not compute
            the results.
    """
    if not isinstance(request, Request):
        raise TypeError(f"request must be one of {_kinds()}, got {request!r}")
    found = _find_head(model)
    if found is None:
        yield
        return
    owner, head = found
    block = _Block(owner, head, request)
    with block.installed():
        yield
    if not block.passes:
        raise RuntimeError(f"the {type(owner).__name__} was not called in the block of `returning`")


class DeferredResults(DeferredLogits):
    """`DeferredLogits` of a forward pass that returns results.

    Args:
        layer, hidden, weight, scale: as in `DeferredLogits`.
        block: the block of the forward pass.
    """

    def __init__(
        self, layer: nn.Module, hidden: Tensor, weight: Tensor | None, scale: float = 1.0, *, block: _Block
    ) -> None:
        super().__init__(layer, hidden, weight, scale)
        self._block = block

    def results(self, labels: Tensor | None) -> Any:
        """What was requested, for labels [b, s]."""
        compute = self._block.request.compute
        return self._block.made(
            self._use(lambda layer, hidden, weight: compute(layer, hidden, weight, labels, self._scale))
        )

    def transpose(self, first: int, second: int) -> Any:
        """The results, with a method `contiguous` around them: a model without labels calls both."""
        return _Contiguous(self.results(None))

    def _with_scale(self, scale: float) -> DeferredResults:
        return DeferredResults(self._layer, self._hidden, self._weight, scale, block=self._block)


class _Contiguous:
    def __init__(self, results: Any) -> None:
        self._results = results

    def contiguous(self) -> Any:
        return self._results


class _Block:
    """What the hooks and replaced methods of one block share."""

    def __init__(self, owner: Any, head: Fp32OutputLayer, request: Request) -> None:
        self.request = request
        self.passes = 0
        self._owner, self._head = owner, head
        self._running = False
        self._results = 0
        self._labels: Tensor | None = None
        self._signature = inspect.signature(owner.forward)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        if self._head.deferred_results is not None:
            raise RuntimeError("the output layer is in a block of `returning` already")
        name = "compute_language_model_loss"
        own, before = vars(self._owner).get(name), getattr(self._owner, name)
        hooks = [
            self._owner.register_forward_pre_hook(self._before, with_kwargs=True),
            self._owner.register_forward_hook(self._after),
        ]
        self._head.deferred_results = self._defer
        setattr(self._owner, name, functools.partial(self._loss, before))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            del self._head.deferred_results
            delattr(self._owner, name)
            if own is not None:
                setattr(self._owner, name, own)

    def made(self, results: Any) -> Any:
        self._results += 1
        return results

    def _before(self, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**kwargs, **self._signature.bind(*args, **kwargs).arguments}
        if any(given.get(name) is not None for name in ("inference_context", "inference_params")):
            raise ValueError("results come from a forward pass over whole sequences, got an inference context")
        self._labels = given.get("labels")
        if self.request.needs_labels and self._labels is None:
            raise ValueError(f"{type(self.request).__name__} needs labels: pass them to the model, got None")
        self._running, self._results = True, 0

    def _after(self, owner: Any, args: tuple[Any, ...], output: Any) -> None:
        self._running, self._labels = False, None
        self.passes += 1
        if self._results != 1:
            raise RuntimeError(
                f"this {type(owner).__name__} computed the results {self._results} times in a forward pass, not once: "
                "it does not pass its labels and what the output layer returns on as megatron-core's models do"
            )

    def _defer(self, hidden: Tensor, weight: Tensor | None) -> DeferredResults:
        if not self._running:
            raise RuntimeError(
                "the output layer was called in a block of `returning`, but not from within a call of the "
                f"{type(self._owner).__name__}, whose hooks must run"
            )
        return DeferredResults(self._head, hidden, weight, block=self)

    def _loss(self, before: Callable[[Tensor, Any], Any], labels: Tensor, logits: Any) -> Any:
        if isinstance(logits, DeferredResults):
            if labels is self._labels:
                return logits.results(labels)
            if self._head.fp32_config.fused_loss == "off":
                logits = logits.logits()
        return before(labels, logits)


def _find_head(model: Model) -> tuple[LanguageModule, Fp32OutputLayer] | None:
    """The language model that owns the output layer, and the layer; None on a pipeline stage without one."""
    chunks = named_chunks(model)
    heads = [
        (prefix + name, owner, layer)
        for prefix, chunk in chunks
        for name, owner, layer in find_output_layers(chunk)
        if why_not_vocabulary_head(layer, owner) is None
    ]
    if not heads:
        reasons_without_head(chunks)
        return None
    if len(heads) > 1:
        raise ValueError(f"expected one output layer, found {', '.join(name for name, _, _ in heads)}")
    name, owner, layer = heads[0]
    if not isinstance(layer, Fp32OutputLayer):
        raise TypeError(
            f"expected {name} to be an Fp32OutputLayer, got {type(layer).__qualname__}: call apply_fp32 first"
        )
    if not name.endswith("output_layer"):
        raise ValueError(f"results without logits would not have what the LoRA layer around {name} adds to them")
    takes_labels = "labels" in inspect.signature(owner.forward).parameters
    if not isinstance(owner, LanguageModule) or not takes_labels:
        raise ValueError(
            f"expected {name} in a megatron-core language model whose forward pass has an argument labels, got a "
            f"{type(owner).__name__}"
        )
    check_plain_product(layer)
    return owner, layer


def _kinds() -> str:
    return ", ".join(sorted(kind.__name__ for kind in Request.__subclasses__()))
