"""The output layer with fp32 logits, and the way to turn a built one into it."""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import copy
import functools
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

# Arguments that newer releases pass to _forward_impl, and the values under which they ask for nothing else.
_NEUTRAL_ARGUMENTS = {"gtp_remat_size": (1,), "output_dtype": (None, torch.float32)}


class Fp32OutputLayer(ColumnParallelLinear):
    """`ColumnParallelLinear` whose product keeps the fp32 accumulator.

    Weight, bias, state-dict keys, `gather_output`, `sequence_parallel` and tied weights are the parent's; only the
    product and its gradients differ (`megatron_fp32.ops.logits`). Logits leave as fp32 [s, b, vocab / tp], or
    [s, b, vocab] gathered.

    Attributes:
        fp32_config: the configuration it was made with.
        fp32_calls: how many times the fp32 product ran (in compiled code: whether it did), for proving that it did.
    """

    fp32_config: Fp32Config
    fp32_calls: int

    def __init__(self, *args: Any, fp32_config: Fp32Config | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = config_or_default(fp32_config, name="fp32_config")
        _check_convertible(self, config)
        _take_over(self, config)

    def __repr__(self) -> str:
        """megatron-core's text, and what is fp32: the class keeps megatron-core's name."""
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
        """As the parent: (logits, bias or None); with `Fp32Config.fused_loss`, (DeferredLogits, None).

        Gathered logits are always computed: who asks for them is no loss.

        Args:
            input_: [s, b, hidden], or [s / tp, b, hidden] with sequence parallel.
            weight: tied weight, [vocab / tp, hidden]; required when the layer has none of its own.
            runtime_gather_output: overrides `gather_output`.
            use: return `use(layer, input_, weight)` instead; it runs between the hooks of this module.
        """
        if use is not None:
            return use(self, input_, weight)
        gather = self.gather_output if runtime_gather_output is None else runtime_gather_output
        if self.fp32_config.fused_loss != "off" and not gather:
            return DeferredLogits(self, input_, weight), None
        return self.compute_logits(input_, weight, runtime_gather_output)

    def compute_logits(
        self, input_: Tensor, weight: Tensor | None, runtime_gather_output: bool | None
    ) -> tuple[Tensor, Tensor | None]:
        """(logits, bias or None), whatever `fused_loss` is; arguments as of `forward`."""
        _refuse_rounding_inference(self)
        if self.output_size_per_partition == self.output_size:
            # megatron-core's gather over one rank returns its input from within an autograd Function. That is a view
            # which must not be changed in place, and megatron-core's own cross entropy does that to fp32 logits.
            runtime_gather_output = False
        return super().forward(input_, weight=weight, runtime_gather_output=runtime_gather_output)

    def choose_and_mark_weight(self, weight: Tensor | None) -> Tensor:
        """The weight to multiply with: `weight`, or the layer's own for None.

        Sets `zero_out_wgrad` on a tied weight with `main_grad`: Megatron's DistributedDataParallel then adds the
        embedding's gradient to the gradient that the output layer has put into `main_grad`.

        Raises:
            ValueError: when there is neither.
        """
        if weight is None:
            if self.weight is None:
                raise ValueError("the output layer has no weight of its own, and none came with the call")
            return self.weight
        if weight is not self.weight and follows_main_grad(weight):
            # The weight of an embedding, whose own gradient comes through autograd. megatron-core says this of tied
            # weights without pipeline parallelism; with it, an embedding for MTP lies on the last stage too.
            weight.zero_out_wgrad = True  # type: ignore[attr-defined]
        return weight

    def operator_arguments(self) -> dict[str, Any]:
        """What the operators of `ops.logprobs` take from the layer and its configuration."""
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
        # gradient_accumulation_fusion chooses Apex's kernel; here dW goes to main_grad wherever there is one.
        unknown = {k: v for k, v in newer.items() if k not in _NEUTRAL_ARGUMENTS or v not in _NEUTRAL_ARGUMENTS[k]}
        if unknown:
            raise ValueError(f"Fp32OutputLayer does not know these arguments of this megatron-core: {unknown}")
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
        """The copy shares the process group, which cannot be copied."""
        memo[id(self.tp_group)] = self.tp_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle without the process group, which is looked up again where the layer is unpickled.

        Raises:
            ValueError: when the layer's group is not megatron-core's tensor-parallel group, or something was mixed into
                its class after the conversion.
        """
        if self.tp_group is not get_tensor_model_parallel_group_if_none(None):
            raise ValueError("an output layer with a tensor-parallel group of its own cannot be pickled")
        hooks = type(self._load_state_dict_pre_hooks)(
            # megatron-core's lambda cannot be pickled; unpickling registers it again.
            (key, hook)
            for key, hook in self._load_state_dict_pre_hooks.items()
            if getattr(hook.hook, "__module__", None) != ColumnParallelLinear.__module__
        )
        stock = getattr(type(self), "_stock_class", ColumnParallelLinear)
        if type(self) is not _fp32_class(stock):
            raise ValueError(f"{type(self).__mro__[:3]} was made after fp32 conversion and cannot be pickled")
        state = {**self.__dict__, "tp_group": None, "_load_state_dict_pre_hooks": hooks}
        return _rebuild, (stock,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.tp_group = get_tensor_model_parallel_group_if_none(None)
        if self.tp_group is not None and dist.get_world_size(self.tp_group) != self._tensor_parallel_size():
            raise ValueError(
                f"the layer was pickled at tensor-parallel size {self._tensor_parallel_size()}, "
                f"here it is {dist.get_world_size(self.tp_group)}"
            )
        self._register_load_state_dict_pre_hook(_declare_extra_state)

    def _tensor_parallel_size(self) -> int:
        return int(self.output_size // self.output_size_per_partition)


def to_fp32_output_layer(layer: ColumnParallelLinear, config: Fp32Config | None = None) -> Fp32OutputLayer:
    """Turn a built output layer into an `Fp32OutputLayer`, in place, and return it.

    The Parameter, its attributes, hooks and the state-dict keys stay the same objects. A subclass of
    `ColumnParallelLinear` that changes what goes in or comes out, such as Gemma's soft cap, still does: it receives
    fp32 logits. Calling this again only replaces the configuration.

    Raises:
        TypeError: for a layer that is no `ColumnParallelLinear`, or computes its product in its own way.
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
    """Raise what `to_fp32_output_layer` would raise for this layer."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    if not isinstance(layer, ColumnParallelLinear):
        raise TypeError(f"expected a {ColumnParallelLinear.__module__}.ColumnParallelLinear, got {kind}")
    if hasattr(layer, "weight_quantizer"):
        raise TypeError(f"{kind} is quantized by ModelOpt: its product has quantized operands")
    own_product = type(layer)._forward_impl not in (ColumnParallelLinear._forward_impl, Fp32OutputLayer._forward_impl)
    if own_product or "_forward_impl" in vars(layer):
        raise TypeError(f"{kind} has a product of its own (_forward_impl): fp32 logits would replace it without a word")
    _check_convertible(layer, config)


# Megatron-Bridge chooses a mapping by type(module).__name__; pickle finds the class by its __qualname__.
Fp32OutputLayer.__name__ = ColumnParallelLinear.__name__


def _take_over(layer: Any, config: Fp32Config) -> None:
    layer.fp32_config = config
    layer.fp32_calls = 0
    # The gather over symmetric memory has buffers and conditions that depend on the dtype, and was never run with fp32.
    layer.use_inference_optimized_all_gather = False


@functools.cache
def _fp32_class(stock: type[ColumnParallelLinear]) -> type[Fp32OutputLayer]:
    if stock is ColumnParallelLinear:
        return Fp32OutputLayer
    names = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "_stock_class": stock}
    # In front of the subclass: its forward runs between ours and the parent's, and sees fp32 logits.
    return type(stock.__name__, (Fp32OutputLayer, stock), names)


def _rebuild(stock: type[ColumnParallelLinear]) -> Fp32OutputLayer:
    fp32 = _fp32_class(stock)  # type: ignore[arg-type]
    return fp32.__new__(fp32)


def _declare_extra_state(state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
    state_dict.setdefault(f"{prefix}_extra_state")


def _check_convertible(layer: ColumnParallelLinear, fp32: Fp32Config) -> None:
    config = layer.config
    if layer.is_expert:
        raise ValueError("an expert layer is no output layer")
    if fp32.vocab_size is not None and fp32.vocab_size > layer.output_size:
        raise ValueError(
            f"Fp32Config(vocab_size={fp32.vocab_size}) counts tokens without padding, and the output layer has only "
            f"{layer.output_size} rows with it"
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
                "cross_entropy_fusion_impl='native' rounds dY to bf16 before the output layer sees it, so "
                f"grad_precision={fp32.grad_precision!r} would keep nothing; turn cross_entropy_loss_fusion off"
            )
    if config.defer_embedding_wgrad_compute:
        _check_deferrable(layer, fp32)
    if fp32.fused_loss != "off":
        _check_fusible(layer)


def check_plain_product(layer: ColumnParallelLinear) -> None:
    """Raise ValueError unless the layer's logits are the product of hidden states and weight and nothing more."""
    stock = getattr(type(layer), "_stock_class", type(layer))
    if stock.forward not in (ColumnParallelLinear.forward, Fp32OutputLayer.forward):
        raise ValueError(
            f"without logits, what {stock.__module__}.{stock.__qualname__}.forward does to them would be lost"
        )
    if layer.bias is not None:
        raise ValueError("the head without logits does not support an output layer with a bias")


def _check_fusible(layer: ColumnParallelLinear) -> None:
    check_plain_product(layer)
    config = layer.config
    if getattr(config, "cross_entropy_loss_fusion", False):
        raise ValueError("fused_loss computes the cross entropy itself: turn cross_entropy_loss_fusion off")
    if config.defer_embedding_wgrad_compute:
        raise ValueError(
            "fused_loss computes dW with the rest of its gradients: turn defer_embedding_wgrad_compute off"
        )


def _check_deferrable(layer: ColumnParallelLinear, fp32: Fp32Config) -> None:
    if fp32.grad_precision != "bf16":
        raise ValueError(
            "defer_embedding_wgrad_compute keeps dY in bf16 for Apex' kernel: it needs grad_precision='bf16', "
            f"got {fp32.grad_precision!r}"
        )
    if layer.embedding_activation_buffer is None or layer.grad_output_buffer is None:
        raise ValueError(
            "defer_embedding_wgrad_compute is on, but the model gave its output layer no buffers (HybridModel does not)"
        )
    if getattr(layer.config, "mtp_num_layers", None):
        raise ValueError(
            "defer_embedding_wgrad_compute pairs hidden states in forward order with gradients in backward order, "
            "which differ with multi-token prediction: the weight gradient would be wrong. Turn it off"
        )


def _refuse_rounding_inference(layer: ColumnParallelLinear) -> None:
    """Raise where megatron-core's inference engine is about to copy fp32 logits into a buffer of 16 bits."""
    config = layer.config
    if InferenceMode is None or not InferenceMode.is_active() or config.params_dtype == torch.float32:
        return
    graphs = getattr(config, "cuda_graph_impl", "none") == "local"
    if graphs or config.pipeline_model_parallel_size > 1:
        what = "CUDA graphs (cuda_graph_impl='local')" if graphs else "pipeline parallelism"
        raise ValueError(
            f"megatron-core's inference engine rounds logits to {config.params_dtype} under {what}; turn that off for "
            "inference, or use Fp32Config(logits=False)"
        )
