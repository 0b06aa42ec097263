"""float8 weights with a scale for each block or each channel."""

from megatron_fp32.ops.fp8.quantize import (
    Quantized,
    check_quantized,
    dequantize_blockwise,
    dequantize_channelwise,
    quantize_blockwise,
    quantize_channelwise,
)

__all__ = [
    "Quantized",
    "check_quantized",
    "dequantize_blockwise",
    "dequantize_channelwise",
    "quantize_blockwise",
    "quantize_channelwise",
]
