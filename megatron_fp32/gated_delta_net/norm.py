"""An RMSNorm with zero-centred gamma and sequence parallelism, for the local spec.

megatron-core's `WrappedTorchNorm` (megatron/core/transformer/torch_norm.py) refuses both. All norms of Qwen3-Next and
Qwen3.5 except `out_norm` are zero-centred.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.jit import jit_fuser
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class PreLinearRMSNorm(nn.Module):
    """RMSNorm in front of a linear layer. Transformer Engine has one module for both.

    `y = x / sqrt(mean(x^2) + eps) * w`, with `1 + w` instead of w if `config.layernorm_zero_centered_gamma` is set. It
    is computed in fp32 and rounded once to the dtype of the weight. Transformer Engine's RMSNorm returns the dtype of
    the weight, too, so an fp32 weight gives an fp32 result under either spec.

    Args:
        config: gives `layernorm_zero_centered_gamma`, `sequence_parallel` and `params_dtype`.
        hidden_size: size of the last dimension.
        eps: added to the mean square.

    Raises:
        ValueError: when `config.normalization` is not `"RMSNorm"`.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        if config.normalization != "RMSNorm":
            raise ValueError(f"expected config.normalization 'RMSNorm', got {config.normalization!r}")
        self.eps = eps
        self.zero_centered_gamma = config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered_gamma else torch.ones
        self.weight = nn.Parameter(start(hidden_size, dtype=config.params_dtype))
        # finalize_model_grads reads this mark, and then sums the gradient over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """The norm of x [..., hidden_size], of any floating dtype. The result has x's shape and the weight's dtype."""
        return _norm(x, self.weight, self.eps, self.zero_centered_gamma)

    def extra_repr(self) -> str:
        """Size, epsilon and whether gamma is zero-centred, for `print(model)`."""
        return f"{self.weight.numel()}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"


def _norm(x: Tensor, weight: Tensor, eps: float, zero_centered_gamma: bool) -> Tensor:
    compute = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    gamma = weight.to(compute)
    if zero_centered_gamma:
        gamma = 1 + gamma
    return F.rms_norm(x.to(compute), weight.shape, gamma, eps).to(weight.dtype)


@jit_fuser
def _gated_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, zero_centered_gamma: bool, act_fn: Callable[[Tensor], Tensor]
) -> Tensor:
    y = _norm(x.reshape(-1, x.shape[-1]), weight, eps, zero_centered_gamma)
    y = y * act_fn(gate.reshape(-1, gate.shape[-1]).float())
    return y.to(x.dtype)


class RMSNorm(PreLinearRMSNorm):
    """RMSNorm as a module of its own: `q_layernorm`, `k_layernorm`, `out_norm`, `final_layernorm`.

    With a gate it is the gated norm of a gated-delta-net layer, `norm(x) * act(gate)`, compiled as one function.

    Transformer Engine's norm stores an `_extra_state`. This norm stores an empty one, so that a checkpoint of either
    spec loads strictly under the other.
    """

    def forward(
        self, x: Tensor, gate: Tensor | None = None, act_fn: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The norm of x [..., hidden_size], in x's shape and the weight's dtype.

        With `gate` [..., hidden_size] and `act_fn`, the result is the gated norm, [tokens, hidden_size] in the dtype of
        `x`, rounded once, as in megatron-core's `GatedDeltaNet._apply_gated_norm`.
        """
        if gate is None:
            return super().forward(x)
        return _gated_norm(x, gate, self.weight, self.eps, self.zero_centered_gamma, act_fn)

    def get_extra_state(self) -> None:
        """None: this norm has no FP8 state."""
        return None

    def set_extra_state(self, state: Any) -> None:
        """Ignore the state, as megatron-core's local linear layers do."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
