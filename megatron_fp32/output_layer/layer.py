"""The output layer with fp32 logits, and the function that turns a built output layer into one."""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from megatron_fp32.config import Fp32Config, config_or_default
from megatron_fp32.kept_parameters.fp32_calls import count_fp32_call
from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.autograd import DeferredWeightGrad
from megatron_fp32.ops.products.main_grad import follows_main_grad
from megatron_fp32.ops.products.shard import VocabParallel
from megatron_fp32.output_layer.fused_loss import DeferredLogits, Use

try:
    from megatron.core.inference.utils import InferenceMode
except ImportError:  # megatron-core < 0.18
    InferenceMode = None

# Arguments that newer releases pass to _forward_impl, and the values that do not change the result.
_NEUTRAL_ARGUMENTS = {"gtp_remat_size": (1,), "output_dtype": (None, torch.float32)}


class Fp32OutputLayer(ColumnParallelLinear):
    """`ColumnParallelLinear` that returns the fp32 accumulator of its product.

    Weight, bias, state-dict keys, `gather_output`, `sequence_parallel` and tied weights work as in the parent class.
    Only the product and its gradients differ (`megatron_fp32.ops.logits`). Logits are fp32 [s, b, vocab / tp], or
    [s, b, vocab] if they are gathered.

    Attributes:
        fp32_config: the configuration that the layer was made with.
        fp32_calls: how often the fp32 product ran (in compiled code, only whether it ran); `check_fp32` reads it.
        deferred_results: set in a block of `returning`: makes what the layer returns instead of logits, from hidden
            states and weight.
    """

    fp32_config: Fp32Config
    fp32_calls: int
    deferred_results: Callable[[Tensor, Tensor | None], DeferredLogits] | None = None

    def __init__(self, *args: Any, fp32_config: Fp32Config | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = config_or_default(fp32_config, name="fp32_config")
        _check_convertible(self, config)
        _take_over(self, config)

    def __repr__(self) -> str:
        """megatron-core's text and the fp32 options: the class name is megatron-core's."""
        config = self.fp32_config
        shown = f"fp32_logits=True, grad_precision={config.grad_precision!r}"
        shown += ", invariant=True" if config.invariant else ""
        shown += f", fused_loss={config.fused_loss!r}" if config.fused_loss != "off" else ""
        return f"{super().__repr__().removesuffix(')')}, {shown})"

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        use: Use | None = None,
    ) -> Any:
        """(logits, bias or None), as in the parent class; with `Fp32Config.fused_loss`, (DeferredLogits, None).

        Gathered logits are always computed, because the loss does not gather them.

        Args:
            input_: [s, b, hidden], or [s / tp, b, hidden] with sequence parallelism.
            weight: tied weight, [vocab / tp, hidden]; required if the layer does not have a weight of its own.
            runtime_gather_output: overrides `gather_output`.
            use: if given, the result is `use(layer, input_, weight)`, which runs between this module's hooks.
        """
        if use is not None:
            return use(self, input_, weight)
        if self.deferred_results is not None:
            return self.deferred_results(input_, weight), None
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if self.fp32_config.fused_loss != "off" and not gather:
            return DeferredLogits(self, input_, weight), None
        return self.compute_logits(input_, weight, runtime_gather_output)

    def compute_logits(
        self, input_: Tensor, weight: Tensor | None, runtime_gather_output: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, bias or None), also with `fused_loss`. See `forward` for the arguments."""
        _refuse_rounding_inference(self)
        if self.output_size_per_partition == self.output_size:
            # megatron-core's gather over one rank returns its input from within an autograd Function. The result is a
            # view that must not be changed in place, but megatron-core's cross entropy changes fp32 logits in place.
            runtime_gather_output = False
        return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)

    def choose_and_mark_weight(self, weight: Tensor | None) -> Tensor:
        """The weight to multiply with: `weight`, or the layer's own for None.

        Sets `zero_out_wgrad` on a tied weight with `main_grad`: Megatron's DistributedDataParallel then adds the
        embedding's gradient to the gradient that the output layer has put into `main_grad`.

        Raises:
            ValueError: when `weight` is None and the layer does not have a weight.
        """
        if weight is None:
            if self.weight is None:
                raise ValueError("the output layer does not have a weight of its own: pass weight, got None")
            return self.weight
        if weight is not self.weight and follows_main_grad(weight):
            # The weight belongs to an embedding, whose gradient comes through autograd. megatron-core sets this mark on
            # tied weights without pipeline parallelism only, but the last stage has an embedding if it has MTP.
            weight.zero_out_wgrad = True  # type: ignore[attr-defined]
        return weight

    def operator_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the operators in `ops.logprobs` that follow from the layer and its configuration."""
        return {
            "vocab_parallel": VocabParallel(
                group=self.tp_group,
                sequence_parallel=self.sequence_parallel,
                reduce_hidden_grad=self.allreduce_dgrad,
                vocab_size=self.fp32_config.vocab_size,
            ),
            "grad_precision": self.fp32_config.grad_precision,
            "invariant": self.fp32_config.invariant,
        }

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: dist.ProcessGroup | None = None,
        gradient_accumulation_fusion: bool = False,
        grad_output_buffer: list[Tensor] | None = None,
        wgrad_deferral_limit: int | None = None,
        **newer: Any,
    ) -> Tensor:
        # gradient_accumulation_fusion selects Apex's kernel. Here dW is always added to main_grad if there is one.
        unknown = {k: v for k, v in newer.items() if k not in _NEUTRAL_ARGUMENTS or v not in _NEUTRAL_ARGUMENTS[k]}
        if unknown:
            raise ValueError(f"Fp32OutputLayer does not support these arguments of this megatron-core: {unknown}")
        weight = self.choose_and_mark_weight(weight)
        deferred = None
        if grad_output_buffer is not None:
            deferred = DeferredWeightGrad(buffer=grad_output_buffer, limit=wgrad_deferral_limit or 0)
        logits = fp32_logits(
            input,
            weight,
            bias,
            tp_group=tp_group if tp_group is not None else self.tp_group,
            sequence_parallel=sequence_parallel,
            reduce_hidden_grad=allreduce_dgrad,
            grad_precision=self.fp32_config.grad_precision,
            deferred=deferred,
            invariant=self.fp32_config.invariant,
        )
        count_fp32_call(self)
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> Fp32OutputLayer:
        """A copy that shares the process group, because process groups cannot be copied."""
        memo[id(self.tp_group)] = self.tp_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle without the process group. Unpickling looks up megatron-core's tensor-parallel group.

        Raises:
            ValueError: when the layer's group is not megatron-core's tensor-parallel group, or its class was changed
                after the conversion.
        """
        if self.tp_group is not get_tensor_model_parallel_group_if_none(None):
            raise ValueError(
                "an output layer can be pickled only if its process group is megatron-core's tensor-parallel group"
            )
        hooks = type(self._load_state_dict_pre_hooks)(
            # megatron-core's lambda cannot be pickled; unpickling registers it again.
            (key, hook)
            for key, hook in self._load_state_dict_pre_hooks.items()
            if getattr(hook.hook, "__module__", None) != ColumnParallelLinear.__module__
        )
        stock = getattr(type(self), "_stock_class", ColumnParallelLinear)
        if type(self) is not _fp32_class(stock):
            raise ValueError(
                f"the class {type(self).__mro__[:3]} was made after the fp32 conversion and cannot be pickled"
            )
        state = {**self.__dict__, "tp_group": None, "_load_state_dict_pre_hooks": hooks}
        return _rebuild, (stock,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.tp_group = get_tensor_model_parallel_group_if_none(None)
        if self.tp_group is not None and dist.get_world_size(self.tp_group) != self._tensor_parallel_size():
            raise ValueError(
                f"the layer was pickled at tensor-parallel size {self._tensor_parallel_size()}, but the size here is "
                f"{dist.get_world_size(self.tp_group)}"
            )
        self._register_load_state_dict_pre_hook(_declare_extra_state)

    def _tensor_parallel_size(self) -> int:
        return int(self.output_size // self.output_size_per_partition)


def to_fp32_output_layer(layer: ColumnParallelLinear, config: Fp32Config | None = None) -> Fp32OutputLayer:
    """Turn a built output layer into an `Fp32OutputLayer`, in place, and return it.

    The Parameter, its attributes, hooks and state-dict keys are not replaced. A subclass of `ColumnParallelLinear` that
    changes the hidden states or the logits, such as Gemma's soft cap, keeps working, with fp32 logits. A second call
    only replaces the configuration.

    Raises:
        TypeError: for a layer that is not a `ColumnParallelLinear`, or that has its own `_forward_impl`.
        ValueError: for a layer whose configuration the fp32 product does not support.
    """
    config = config_or_default(config)
    check_output_layer(layer, config)
    if isinstance(layer, Fp32OutputLayer):
        layer.fp32_config = config
        return layer
    layer.__class__ = _fp32_class(type(layer))  # type: ignore[arg-type]
    _take_over(layer, config)
    return layer


def check_output_layer(layer: ColumnParallelLinear, config: Fp32Config) -> None:
    """Raise the errors that `to_fp32_output_layer` would raise for this layer."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if not isinstance(layer, ColumnParallelLinear):
        raise TypeError(f"expected a {ColumnParallelLinear.__module__}.ColumnParallelLinear, got {kind}")
    if hasattr(layer, "weight_quantizer"):
        raise TypeError(
            f"{kind} is quantized by ModelOpt, and its product has quantized operands: its logits cannot be fp32"
        )
    own_product = type(layer)._forward_impl not in (ColumnParallelLinear._forward_impl, Fp32OutputLayer._forward_impl)
    if own_product or "_forward_impl" in vars(layer):
        raise TypeError(f"{kind} has its own product (_forward_impl), which fp32 logits would replace")
    _check_convertible(layer, config)


# Megatron-Bridge chooses a mapping by type(module).__name__; pickle finds the class by its __qualname__.
Fp32OutputLayer.__name__ = ColumnParallelLinear.__name__


def _take_over(layer: Any, config: Fp32Config) -> None:
    layer.fp32_config = config
    layer.fp32_calls = 0
    # The gather over symmetric memory depends on the dtype, and was never tested with fp32.
    layer.use_inference_optimized_all_gather = False


@functools.cache
def _fp32_class(stock: type[ColumnParallelLinear]) -> type[Fp32OutputLayer]:
    if stock is ColumnParallelLinear:
        return Fp32OutputLayer
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "_stock_class": stock}
    # The subclass comes second, so that its forward runs on fp32 logits, between Fp32OutputLayer's and the parent's.
    return type(stock.__name__, (Fp32OutputLayer, stock), names)


def _rebuild(stock: type[ColumnParallelLinear]) -> Fp32OutputLayer:
    fp32 = _fp32_class(stock)  # type: ignore[arg-type]
    return fp32.__new__(fp32)


def _declare_extra_state(state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
    state_dict.setdefault(f"{prefix}_extra_state")


def _check_convertible(layer: ColumnParallelLinear, fp32: Fp32Config) -> None:
    config = layer.config
    if layer.is_expert:
        raise ValueError("expected an output layer, got the layer of an expert (is_expert=True)")
    if fp32.vocab_size is not None and fp32.vocab_size > layer.output_size:
        raise ValueError(
            f"Fp32Config(vocab_size={fp32.vocab_size}) must be the vocabulary size without padding rows, but the "
            f"output layer has only {layer.output_size} rows with padding"
        )
    if getattr(layer, "gtp_remat_size", 1) != 1:
        raise ValueError(f"fp32 logits do not support a GTP-sharded weight (gtp_remat_size={layer.gtp_remat_size})")
    if getattr(config, "batch_invariant_mode", False) and not fp32.invariant:
        raise ValueError(
            "batch_invariant_mode needs Fp32Config(invariant=True): without it, cuBLAS may choose another order of "
            "summation for another number of tokens"
        )
    if getattr(config, "cross_entropy_loss_fusion", False):
        fusion = config.cross_entropy_fusion_impl
        if fusion not in ("native", "te"):
            raise ValueError(
                f"cross_entropy_fusion_impl={fusion!r} computes the loss without the output layer's logits: fp32 "
                "logits would have no effect"
            )
        if fusion == "native" and fp32.grad_precision != "bf16":
            raise ValueError(
                "cross_entropy_fusion_impl='native' rounds dY to bf16 before the output layer gets it, so "
                f"grad_precision={fp32.grad_precision!r} would have no effect; turn cross_entropy_loss_fusion off"
            )
    if config.defer_embedding_wgrad_compute:
        _check_deferrable(layer, fp32)
    if fp32.fused_loss != "off":
        _check_fusible(layer)


def check_plain_product(layer: ColumnParallelLinear) -> None:
    """Raise ValueError unless the layer's logits are exactly the product of hidden states and weight."""
    stock = getattr(type(layer), "_stock_class", type(layer))
    if stock.forward not in (ColumnParallelLinear.forward, Fp32OutputLayer.forward):
        raise ValueError(
            f"{stock.__module__}.{stock.__qualname__}.forward changes the logits; its change would be lost in a "
            "loss or in log-probs that are computed without logits"
        )
    if layer.bias is not None:
        raise ValueError("the loss and log-probs without logits do not support an output layer with a bias")


def _check_fusible(layer: ColumnParallelLinear) -> None:
    check_plain_product(layer)
    config = layer.config
    if getattr(config, "cross_entropy_loss_fusion", False):
        raise ValueError("fused_loss computes the cross entropy itself: turn cross_entropy_loss_fusion off")
    if config.defer_embedding_wgrad_compute:
        raise ValueError(
            "fused_loss computes dW together with its other gradients: turn defer_embedding_wgrad_compute off"
        )


def _check_deferrable(layer: ColumnParallelLinear, fp32: Fp32Config) -> None:
    if fp32.grad_precision != "bf16":
        raise ValueError(
            "defer_embedding_wgrad_compute stores dY in bf16 for Apex's kernel: it needs grad_precision='bf16', "
            f"got {fp32.grad_precision!r}"
        )
    if layer.embedding_activation_buffer is None or layer.grad_output_buffer is None:
        raise ValueError(
            "defer_embedding_wgrad_compute is on, but the model did not give its output layer buffers (HybridModel "
            "never does)"
        )
    if getattr(layer.config, "mtp_num_layers", None):
        raise ValueError(
            "defer_embedding_wgrad_compute pairs hidden states in forward order with gradients in backward order, "
            "which differ with multi-token prediction: the weight gradient would be wrong. Turn "
            "defer_embedding_wgrad_compute off"
        )


def _refuse_rounding_inference(layer: ColumnParallelLinear) -> None:
    """Raise ValueError if megatron-core's inference engine would copy fp32 logits into a 16-bit buffer."""
    config = layer.config
    if InferenceMode is None or not InferenceMode.is_active() or config.params_dtype == torch.float32:
        return
    graphs = getattr(config, "cuda_graph_impl", "none") == "local"
    if graphs or config.pipeline_model_parallel_size > 1:
        what = "CUDA graphs (cuda_graph_impl='local')" if graphs else "pipeline parallelism"
        raise ValueError(
            f"megatron-core's inference engine rounds logits to {config.params_dtype} under {what}; turn {what} off "
            "for inference, or use Fp32Config(logits=False)"
        )
