"""Names, order and defaults of the arguments are the frameworks'. The table was written from the files it names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from megatron_fp32.integrations import areal, nemo_rl, slime, verl

NEEDED = inspect.Parameter.empty

SIGNATURES: list[tuple[Callable[..., Any], str, dict[str, Any]]] = [
    (
        areal.gather_logprobs,
        "AReaL areal/utils/functional/vocab_parallel.py at cbff54d64",
        {"logits": NEEDED, "labels": NEEDED, "temperature": 1.0, "tp_group": None, "chunk_size": 1024},
    ),
    (
        areal.gather_logprobs_entropy,
        "AReaL areal/utils/functional/vocab_parallel.py at cbff54d64",
        {"logits": NEEDED, "labels": NEEDED, "temperature": 1.0, "tp_group": None, "chunk_size": 1024,
         "reuse_logits": False},
    ),
    (
        slime.calculate_log_probs_and_entropy,
        "slime slime/utils/ppo_utils.py at 624b824a8",
        {"logits": NEEDED, "tokens": NEEDED, "tp_group": NEEDED, "with_entropy": False, "chunk_size": -1,
         "log_prob_keep_mask": None, "with_entropy_grad": True},
    ),
    (
        verl.vocab_parallel_entropy,
        "verl verl/utils/megatron/tensor_parallel.py at 1dda039b9",
        {"vocab_parallel_logits": NEEDED},
    ),
    (
        verl.vocab_parallel_entropy_with_chunking,
        "verl verl/utils/megatron/tensor_parallel.py at 1dda039b9",
        {"vocab_parallel_logits": NEEDED, "chunk_size": 2048},
    ),
    (
        verl.vocab_parallel_log_probs_from_logits,
        "verl verl/utils/megatron/tensor_parallel.py at 1dda039b9",
        {"logits": NEEDED, "labels": NEEDED},
    ),
    (
        verl.logprobs_from_logits,
        "verl verl/utils/torch_functional.py at 1dda039b9",
        {"logits": NEEDED, "labels": NEEDED, "inplace_backward": True},
    ),
    (verl.entropy_from_logits, "verl verl/utils/torch_functional.py at 1dda039b9", {"logits": NEEDED}),
    (
        verl.entropy_from_logits_with_chunking,
        "verl verl/utils/torch_functional.py at 1dda039b9",
        {"logits": NEEDED, "chunk_size": 2048},
    ),
    (
        verl.linear_cross_entropy,
        "verl verl/utils/kernel/linear_cross_entropy.py at 1dda039b9, LinearCrossEntropy.forward without ctx",
        {"hidden": NEEDED, "weight": NEEDED, "labels": NEEDED, "temperature": 1.0, "reduction": "none",
         "dist_process_group": None},
    ),
    (
        verl.FusedLinearForPPO,
        "verl verl/utils/experimental/torch_functional.py at 1dda039b9",
        {"chunk_size": 512},
    ),
    (
        verl.FusedLinearForPPO().forward,
        "verl verl/utils/experimental/torch_functional.py at 1dda039b9",
        {"hidden_states": NEEDED, "vocab_weights": NEEDED, "input_ids": NEEDED, "temperature": 1.0},
    ),
    (
        nemo_rl.from_parallel_logits_to_logprobs,
        "NeMo-RL nemo_rl/distributed/model_utils.py at 7ea279abf",
        {"vocab_parallel_logits": NEEDED, "target": NEEDED, "vocab_start_index": NEEDED, "vocab_end_index": NEEDED,
         "tp_group": NEEDED, "inference_only": False, "cp_group": None, "chunk_size": None, "sampling_params": None},
    ),
    (
        nemo_rl.from_parallel_logits_to_logprobs_packed_sequences,
        "NeMo-RL nemo_rl/distributed/model_utils.py at 7ea279abf",
        {"vocab_parallel_logits": NEEDED, "target": NEEDED, "cu_seqlens_padded": NEEDED, "unpacked_seqlen": NEEDED,
         "vocab_start_index": NEEDED, "vocab_end_index": NEEDED, "group": NEEDED, "inference_only": False,
         "cp_group": None, "chunk_size": None, "sampling_params": None, "target_is_pre_rolled": False},
    ),
    (
        nemo_rl.get_next_token_logprobs_from_logits,
        "NeMo-RL nemo_rl/distributed/model_utils.py at 7ea279abf",
        {"input_ids": NEEDED, "next_token_logits": NEEDED, "seq_index": None, "vocab_parallel_rank": None,
         "vocab_parallel_group": None, "context_parallel_group": None, "sampling_params": None, "chunk_size": None},
    ),
    (
        nemo_rl.from_parallel_hidden_states_to_logprobs,
        "NeMo-RL nemo_rl/distributed/model_utils.py at 7ea279abf",
        {"tensor_parallel_hidden_states": NEEDED, "output_weight_layer": NEEDED, "runtime_gather_output": NEEDED,
         "target": NEEDED, "vocab_start_index": NEEDED, "vocab_end_index": NEEDED, "tp_group": NEEDED,
         "inference_only": False, "cp_group": None, "chunk_size": None},
    ),
    (
        nemo_rl.ChunkedDistributedEntropy.apply,
        "NeMo-RL nemo_rl/distributed/model_utils.py at 7ea279abf, ChunkedDistributedEntropy.forward without ctx",
        {"vocab_parallel_logits": NEEDED, "chunk_size": NEEDED, "tp_group": NEEDED, "inference_only": False},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "source", "expected"), SIGNATURES, ids=lambda x: getattr(x, "__qualname__", ""))
def test_arguments(function: Callable[..., Any], source: str, expected: dict[str, Any]) -> None:
    parameters = inspect.signature(function).parameters
    assert list(parameters) == list(expected), source
    assert {name: p.default for name, p in parameters.items()} == expected, source
    # The frameworks pass any of them by position or by name.
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
