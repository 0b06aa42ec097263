"""Log-probs, entropy and top-k from GPTModel's forward pass, with `output_processor` (megatron-core >= 0.18)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from megatron_fp32.kept_parameters.fp32_calls import count_fp32_call
from megatron_fp32.ops.logprobs import LogitsTransform, Logprobs, linear_logprobs
from megatron_fp32.ops.logprobs.options import Backward
from megatron_fp32.output_layer.layer import Fp32OutputLayer, check_plain_product
from megatron_fp32.validation import check_choice, check_count, check_flag


def logprobs_processor(
    *,
    temperature: float | Tensor = 1.0,
    mean_logit: bool = False,
    top_k: int = 0,
    backward: Backward = "recompute",
    chunk_size: int | None = None,
) -> Callable[..., Logprobs]:
    """Make an `output_processor` for `GPTModel.forward`, which then returns `Logprobs` [b, s] instead of a loss.

    `model(input_ids, position_ids, attention_mask, labels=labels, output_processor=logprobs_processor())`. The output
    layer must be an `Fp32OutputLayer`. Its configuration gives `grad_precision`, `invariant` and `vocab_size`.
    megatron-core before 0.18 does not have `output_processor`; use `fused_loss` there, whose loss is the negative
    log-prob.

    Args:
        temperature: a positive number, or a tensor of positive numbers that broadcasts to [b, s]: [b, 1] has one number
            for every sequence, [b, s] one for every token.
        mean_logit: see `linear_logprobs`.
        top_k: see `linear_logprobs`; the results are [b, s, top_k].
        backward: see `linear_logprobs`.
        chunk_size: see `linear_logprobs`.

    Raises:
        TypeError: for an argument of another type. The forward pass raises it for another output layer.
        ValueError: for an argument with a value that is not allowed. The forward pass raises it without labels, for an
            output layer with a bias, for a subclass that changes logits, and where `linear_logprobs` raises it.
    """

    check_flag("mean_logit", mean_logit)
    check_count("top_k", top_k, least=0)
    check_choice("backward", backward, get_args(Backward))
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)

    def process(
        *,
        hidden_states: Tensor,
        output_layer: nn.Module,
        output_weight: Tensor | None,
        labels: Tensor | None,
        scale_logits: Callable[[Any], Any] | None = None,
        **others: Any,
    ) -> Logprobs:
        if not isinstance(output_layer, Fp32OutputLayer):
            raise TypeError(
                f"expected an Fp32OutputLayer, got {type(output_layer).__qualname__}: call apply_fp32 first"
            )
        if labels is None:
            raise ValueError("log-probs need labels, got None")
        check_plain_product(output_layer)
        of_tokens = torch.atleast_2d(temperature).t() if isinstance(temperature, Tensor) else temperature

        def use(layer: Any, hidden: Tensor, weight: Tensor | None) -> Logprobs:
            count_fp32_call(layer)
            return linear_logprobs(
                hidden,
                layer.choose_and_mark_weight(weight),
                labels.t().contiguous(),
                temperature=of_tokens,
                # Megatron passes MuP's scale as a function of the logits.
                logits_transform=LogitsTransform(scale=1.0 if scale_logits is None else float(scale_logits(1.0))),
                backward=backward,
                mean_logit=mean_logit,
                top_k=top_k,
                chunk_size=chunk_size,
                **layer.operator_arguments(),
            )

        result = output_layer(hidden_states, weight=output_weight, use=use)
        columns = [None if x is None else x.transpose(0, 1).contiguous() for x in result]
        return Logprobs(*columns)  # type: ignore[arg-type]

    return process
