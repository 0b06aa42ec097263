"""The output layer with fp32 logits, and the way to turn a built one into it."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from megatron_fp32.config import Fp32Config
from megatron_fp32.ops.logits import fp32_logits


class Fp32OutputLayer(ColumnParallelLinear):
    """`ColumnParallelLinear` whose product keeps the fp32 accumulator.

    Weight, bias, state-dict keys, `gather_output`, `sequence_parallel` and tied weights are the parent's; only the
    product and its gradients differ (`megatron_fp32.ops.logits`). Logits leave as fp32 [s, b, vocab / tp], or
    [s, b, vocab] gathered.

    Attributes:
        fp32_config: the configuration it was made with.
        fp32_calls: how many times the fp32 product ran, for proving that it did.
    """

    fp32_config: Fp32Config
    fp32_calls: int

    def __init__(self, *args: Any, fp32_config: Fp32Config | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_convertible(self)
        self.fp32_config = fp32_config or Fp32Config()
        self.fp32_calls = 0

    def forward(
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As the parent: (logits, bias or None).

        Args:
            input_: [s, b, hidden], or [s / tp, b, hidden] with sequence parallel.
            weight: tied weight, [vocab / tp, hidden]; required when the layer has none of its own.
            runtime_gather_output: overrides `gather_output`.
        """
        if self.output_size_per_partition == self.output_size:
            # megatron-core's gather over one rank returns its input from within an autograd Function. That is a view
            # which must not be changed in place, and megatron-core's own cross entropy does that to fp32 logits.
            runtime_gather_output = False
        return super().forward(input_, weight, runtime_gather_output)

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
        unknown = {k: v for k, v in newer.items() if (k, v) != ("gtp_remat_size", 1)}
        if unknown:
            raise ValueError(f"Fp32OutputLayer does not know these arguments of this megatron-core: {unknown}")
        if grad_output_buffer is not None:
            raise ValueError("Fp32OutputLayer does not support defer_embedding_wgrad_compute")
        self.fp32_calls += 1
        return fp32_logits(
            input,
            weight,
            bias,
            tp_group=tp_group if tp_group is not None else self.tp_group,
            sequence_parallel=sequence_parallel,
            reduce_hidden_grad=allreduce_dgrad,
            grad_precision=self.fp32_config.grad_precision,
        )


# Megatron-Bridge chooses a mapping by type(module).__name__; pickle finds the class by its __qualname__.
Fp32OutputLayer.__name__ = ColumnParallelLinear.__name__


def to_fp32_output_layer(layer: ColumnParallelLinear, config: Fp32Config | None = None) -> Fp32OutputLayer:
    """Turn a built output layer into an `Fp32OutputLayer`, in place, and return it.

    The Parameter, its attributes, hooks and the state-dict keys stay the same objects. Calling it again only replaces
    the configuration.

    Raises:
        TypeError: when the layer is anything but megatron-core's own `ColumnParallelLinear`.
        ValueError: for a layer whose configuration the fp32 product does not support.
    """
    if type(layer) not in (ColumnParallelLinear, Fp32OutputLayer):
        raise TypeError(
            f"expected a {ColumnParallelLinear.__module__}.ColumnParallelLinear, got {type(layer).__module__}."
            f"{type(layer).__qualname__}: a subclass may compute its logits in its own way"
        )
    _check_convertible(layer)
    if not isinstance(layer, Fp32OutputLayer):
        layer.__class__ = Fp32OutputLayer
        layer.fp32_calls = 0
    layer.fp32_config = config or Fp32Config()
    return layer


def _check_convertible(layer: ColumnParallelLinear) -> None:
    if layer.config.defer_embedding_wgrad_compute:
        raise ValueError("fp32 logits do not support defer_embedding_wgrad_compute=True; turn it off")
    if layer.is_expert:
        raise ValueError("an expert layer is no output layer")
    if getattr(layer, "gtp_remat_size", 1) != 1:
        raise ValueError(f"fp32 logits do not support a GTP-sharded weight (gtp_remat_size={layer.gtp_remat_size})")
