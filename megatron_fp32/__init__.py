"""fp32 logits, log-probs and parameters in models that otherwise run in bf16 on Megatron-core."""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

if _typing.TYPE_CHECKING:
    from megatron_fp32.apply import apply_fp32 as apply_fp32
    from megatron_fp32.apply import pre_wrap_hook as pre_wrap_hook
    from megatron_fp32.check import check_fp32 as check_fp32
    from megatron_fp32.checkpoint.compare.verify import verify_checkpoints as verify_checkpoints
    from megatron_fp32.checkpoint.convert import export_checkpoint as export_checkpoint
    from megatron_fp32.checkpoint.convert import import_checkpoint as import_checkpoint
    from megatron_fp32.checkpoint.inspect import inspect_checkpoint as inspect_checkpoint
    from megatron_fp32.checkpoint.quantize import quantize_checkpoint as quantize_checkpoint
    from megatron_fp32.config import Fp32Config as Fp32Config
    from megatron_fp32.errors import CheckpointError as CheckpointError
    from megatron_fp32.errors import TransferError as TransferError
    from megatron_fp32.gated_delta_net.layer import Fp32GatedDeltaNet as Fp32GatedDeltaNet
    from megatron_fp32.kept_parameters.keep_in_fp32 import keep_in_fp32 as keep_in_fp32
    from megatron_fp32.models.flags import add_fp32_arguments as add_fp32_arguments
    from megatron_fp32.models.flags import fp32_config_from_args as fp32_config_from_args
    from megatron_fp32.models.provider import model_provider as model_provider
    from megatron_fp32.ops.logits import fp32_logits as fp32_logits
    from megatron_fp32.ops.logprobs import Divergence as Divergence
    from megatron_fp32.ops.logprobs import LogitsTransform as LogitsTransform
    from megatron_fp32.ops.logprobs import Logprobs as Logprobs
    from megatron_fp32.ops.logprobs import SelectedLogprobs as SelectedLogprobs
    from megatron_fp32.ops.logprobs import TruncatedLogprobs as TruncatedLogprobs
    from megatron_fp32.ops.logprobs import VocabParallel as VocabParallel
    from megatron_fp32.ops.logprobs import WeightedLoss as WeightedLoss
    from megatron_fp32.ops.logprobs import linear_cross_entropy as linear_cross_entropy
    from megatron_fp32.ops.logprobs import linear_distillation as linear_distillation
    from megatron_fp32.ops.logprobs import linear_logprobs as linear_logprobs
    from megatron_fp32.ops.logprobs import linear_selected_logprobs as linear_selected_logprobs
    from megatron_fp32.ops.logprobs import linear_top_k_distillation as linear_top_k_distillation
    from megatron_fp32.ops.logprobs import linear_top_logprobs as linear_top_logprobs
    from megatron_fp32.ops.logprobs import linear_truncated_logprobs as linear_truncated_logprobs
    from megatron_fp32.ops.logprobs import linear_truncation_thresholds as linear_truncation_thresholds
    from megatron_fp32.ops.logprobs import logprobs_from_logits as logprobs_from_logits
    from megatron_fp32.ops.logprobs import weighted_cross_entropy as weighted_cross_entropy
    from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs as install_optimizer_repairs
    from megatron_fp32.output_layer.layer import Fp32OutputLayer as Fp32OutputLayer
    from megatron_fp32.output_layer.layer import to_fp32_output_layer as to_fp32_output_layer
    from megatron_fp32.output_layer.logprobs_processor import logprobs_processor as logprobs_processor
    from megatron_fp32.output_layer.requests import LogprobsRequest as LogprobsRequest
    from megatron_fp32.output_layer.requests import SelectedLogprobsRequest as SelectedLogprobsRequest
    from megatron_fp32.output_layer.requests import TopLogprobsRequest as TopLogprobsRequest
    from megatron_fp32.output_layer.requests import TruncatedLogprobsRequest as TruncatedLogprobsRequest
    from megatron_fp32.output_layer.requests import WeightedLossRequest as WeightedLossRequest
    from megatron_fp32.results import returning as returning
    from megatron_fp32.streaming import HuggingFaceDirectory as HuggingFaceDirectory
    from megatron_fp32.streaming import SGLangOptions as SGLangOptions
    from megatron_fp32.streaming import SGLangSink as SGLangSink
    from megatron_fp32.streaming import VllmOptions as VllmOptions
    from megatron_fp32.streaming import VllmSink as VllmSink
    from megatron_fp32.streaming import WeightStreamer as WeightStreamer
    from megatron_fp32.weights.fp8.scheme import Fp8Scheme as Fp8Scheme
    from megatron_fp32.weights.fp8.scheme import named_scheme as named_scheme

__version__ = "0.1.0"

# A name is imported on first use, because some names need megatron-core or Triton and the others must work without.
_MODULES = {
    "CheckpointError": "errors",
    "Divergence": "ops.logprobs",
    "Fp32Config": "config",
    "Fp32GatedDeltaNet": "gated_delta_net.layer",
    "Fp32OutputLayer": "output_layer.layer",
    "Fp8Scheme": "weights.fp8.scheme",
    "HuggingFaceDirectory": "streaming",
    "LogitsTransform": "ops.logprobs",
    "Logprobs": "ops.logprobs",
    "LogprobsRequest": "output_layer.requests",
    "SGLangOptions": "streaming",
    "SGLangSink": "streaming",
    "SelectedLogprobs": "ops.logprobs",
    "SelectedLogprobsRequest": "output_layer.requests",
    "TopLogprobsRequest": "output_layer.requests",
    "TransferError": "errors",
    "TruncatedLogprobs": "ops.logprobs",
    "TruncatedLogprobsRequest": "output_layer.requests",
    "VllmOptions": "streaming",
    "VllmSink": "streaming",
    "VocabParallel": "ops.logprobs",
    "WeightStreamer": "streaming",
    "WeightedLoss": "ops.logprobs",
    "WeightedLossRequest": "output_layer.requests",
    "add_fp32_arguments": "models.flags",
    "apply_fp32": "apply",
    "check_fp32": "check",
    "export_checkpoint": "checkpoint.convert",
    "fp32_config_from_args": "models.flags",
    "fp32_logits": "ops.logits",
    "import_checkpoint": "checkpoint.convert",
    "inspect_checkpoint": "checkpoint.inspect",
    "install_optimizer_repairs": "optimizer.native_fp32",
    "keep_in_fp32": "kept_parameters.keep_in_fp32",
    "linear_cross_entropy": "ops.logprobs",
    "linear_distillation": "ops.logprobs",
    "linear_logprobs": "ops.logprobs",
    "linear_selected_logprobs": "ops.logprobs",
    "linear_top_k_distillation": "ops.logprobs",
    "linear_top_logprobs": "ops.logprobs",
    "linear_truncated_logprobs": "ops.logprobs",
    "linear_truncation_thresholds": "ops.logprobs",
    "logprobs_from_logits": "ops.logprobs",
    "logprobs_processor": "output_layer.logprobs_processor",
    "model_provider": "models.provider",
    "named_scheme": "weights.fp8.scheme",
    "pre_wrap_hook": "apply",
    "quantize_checkpoint": "checkpoint.quantize",
    "returning": "results",
    "to_fp32_output_layer": "output_layer.layer",
    "verify_checkpoints": "checkpoint.compare.verify",
    "weighted_cross_entropy": "ops.logprobs",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> _typing.Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
