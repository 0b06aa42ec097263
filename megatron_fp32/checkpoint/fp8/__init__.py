"""FP8 checkpoints in the formats of existing producers: which tensors, with which names and which config."""

from megatron_fp32.checkpoint.fp8.detect import detect_scheme, scheme_of_tensors
from megatron_fp32.weights.experts import expert_parts
from megatron_fp32.weights.fp8.config import extra_files, quantization_config, scheme_from_config
from megatron_fp32.weights.fp8.scheme import Fp8Scheme, is_quantized, named_scheme
from megatron_fp32.weights.fp8.tensors import fp8_infos, partial_blocks, quantize_tensor

__all__ = [
    "Fp8Scheme",
    "detect_scheme",
    "expert_parts",
    "extra_files",
    "fp8_infos",
    "is_quantized",
    "named_scheme",
    "partial_blocks",
    "quantization_config",
    "quantize_tensor",
    "scheme_from_config",
    "scheme_of_tensors",
]
