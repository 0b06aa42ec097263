"""Log-probs, entropy and top-k from GPTModel's forward pass, with `output_processor` (megatron-core >= 0.18)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from megatron_fp32.ops.logprobs import Logprobs
from megatron_fp32.ops.logprobs.options import Backward
from megatron_fp32.output_layer.layer import Fp32OutputLayer, check_plain_product
from megatron_fp32.output_layer.requests import LogprobsRequest


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
    `returning` does the same in every megatron-core and every language model; schedule plans need `output_processor`.

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
    request = LogprobsRequest(
        temperature=temperature, mean_logit=mean_logit, top_k=top_k, backward=backward, chunk_size=chunk_size
    )

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
        # Megatron passes MuP's scale as a function of the logits.
        scale = 1.0 if scale_logits is None else float(scale_logits(1.0))

        def use(layer: Any, hidden: Tensor, weight: Tensor | None) -> Any:
            return request.compute(layer, hidden, weight, labels, scale)

        return output_layer(hidden_states, weight=output_weight, use=use)  # type: ignore[no-any-return]

    return process
