"""Log-probs, entropy and loss of the output layer, from hidden states and weight, without the logits."""

from megatron_fp32.ops.logprobs.autograd import Logprobs, linear_logprobs
from megatron_fp32.ops.logprobs.loss import LossWithMetrics, linear_cross_entropy
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.logprobs.weighted import WeightedLoss, weighted_cross_entropy
from megatron_fp32.ops.products.shard import VocabParallel

__all__ = [
    "LogitsTransform",
    "Logprobs",
    "LossWithMetrics",
    "VocabParallel",
    "WeightedLoss",
    "linear_cross_entropy",
    "linear_logprobs",
    "weighted_cross_entropy",
]
