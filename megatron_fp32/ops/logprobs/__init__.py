"""Log-probs, entropy and loss of the output layer: from hidden states and weight, or from logits that are stored."""

from megatron_fp32.ops.logprobs.autograd import Logprobs, linear_logprobs
from megatron_fp32.ops.logprobs.from_logits import logprobs_from_logits
from megatron_fp32.ops.logprobs.loss import linear_cross_entropy
from megatron_fp32.ops.logprobs.softmax import LogitsTransform
from megatron_fp32.ops.logprobs.weighted import WeightedLoss, weighted_cross_entropy
from megatron_fp32.ops.products.shard import VocabParallel

__all__ = [
    "LogitsTransform",
    "Logprobs",
    "VocabParallel",
    "WeightedLoss",
    "linear_cross_entropy",
    "linear_logprobs",
    "logprobs_from_logits",
    "weighted_cross_entropy",
]
