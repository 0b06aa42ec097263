"""The RMSNorm that megatron-core's local spec lacks: zero-centred gamma and sequence parallel.

`WrappedTorchNorm` (megatron/core/transformer/torch_norm.py) refuses both, and every norm of Qwen3-Next and Qwen3.5 but
one is zero-centred.
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
    """RMSNorm in front of a linear layer, where Transformer Engine has one module for both.

    `y = x / sqrt(mean(x^2) + eps) * w`, with `1 + w` for w where `config.layernorm_zero_centered_gamma` says so,
    computed in fp32 and rounded once to the dtype of the weight. That is also the dtype that Transformer Engine's
    RMSNorm returns, so an fp32 weight gives an fp32 result under either spec.

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
        # Read by finalize_model_grads, which then sums the gradient over the tensor-parallel ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden_size] in any floating dtype -> the same shape in the dtype of the weight."""
        return _norm(x, self.weight, self.eps, self.zero_centered_gamma)

    def extra_repr(self) -> str:
        """Size, epsilon and storage convention, for `print(model)`."""
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
    """RMSNorm that stands alone: `q_layernorm`, `k_layernorm`, `out_norm`, `final_layernorm`.

    With a gate it is the gated norm of a gated-delta-net layer, `norm(x) * act(gate)`, compiled as one function.

    Its Transformer Engine counterpart stores an `_extra_state`, so this one declares an empty one too: a checkpoint
    written under either spec then loads strictly under the other.
    """

    def forward(
        self, x: Tensor, gate: Tensor | None = None, act_fn: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """x [..., hidden_size] -> the same shape in the dtype of the weight.

        With `gate` [..., hidden_size] and `act_fn`: [tokens, hidden_size] in the dtype of `x`, rounded once, as
        megatron-core's `GatedDeltaNet._apply_gated_norm`.
        """
        if gate is None:
            return super().forward(x)
        return _gated_norm(x, gate, self.weight, self.eps, self.zero_centered_gamma, act_fn)

    def get_extra_state(self) -> None:
        """Nothing: there is no FP8 state here."""
        return None

    def set_extra_state(self, state: Any) -> None:
        """Ignored, as megatron-core's local linear layers do."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.setdefault(f"{prefix}_extra_state", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
