"""fp32 logits from 16-bit operands."""

from megatron_fp32.ops.logits.autograd import fp32_logits

__all__ = ["fp32_logits"]
