"""Log-probs, entropy and loss of the output layer: from hidden states and weight, or from logits that are stored."""

from megatron_fp32.ops.logprobs.autograd import Logprobs, linear_logprobs
from megatron_fp32.ops.logprobs.distillation import Distillation, linear_distillation
from megatron_fp32.ops.logprobs.divergence import Divergence
from megatron_fp32.ops.logprobs.from_logits import logprobs_from_logits
from megatron_fp32.ops.logprobs.loss import LossWithMetrics, linear_cross_entropy
from megatron_fp32.ops.logprobs.selected import SelectedLogprobs, linear_selected_logprobs, linear_top_logprobs
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.logprobs.thresholds import linear_truncation_thresholds
from megatron_fp32.ops.logprobs.top_k_distillation import TopKDistillation, linear_top_k_distillation
from megatron_fp32.ops.logprobs.truncated import TruncatedLogprobs, linear_truncated_logprobs
from megatron_fp32.ops.logprobs.weighted import WeightedLoss, weighted_cross_entropy
from megatron_fp32.ops.products.shard import VocabParallel

__all__ = [
    "Distillation",
    "Divergence",
    "LogitsTransform",
    "Logprobs",
    "LossWithMetrics",
    "SelectedLogprobs",
    "TopKDistillation",
    "TruncatedLogprobs",
    "VocabParallel",
    "WeightedLoss",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_logprobs",
    "linear_selected_logprobs",
    "linear_top_k_distillation",
    "linear_top_logprobs",
    "linear_truncated_logprobs",
    "linear_truncation_thresholds",
    "logprobs_from_logits",
    "weighted_cross_entropy",
]
