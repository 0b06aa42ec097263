"""NeMo-RL's functions for next-token log-probs, from vocabulary-parallel logits and from hidden states.

    from megatron_fp32.integrations.nemo_rl import from_parallel_logits_to_logprobs

in place of `from nemo_rl.distributed.model_utils import ...`, and the other names below likewise, in
nemo_rl/models/megatron/train.py and nemo_rl/algorithms/loss/utils.py. `ChunkedDistributedEntropy` and
`from_parallel_hidden_states_to_logprobs` are called in model_utils.py itself.

Signatures of nemo_rl/distributed/model_utils.py, NeMo-RL main at 7ea279abf (2026-08-22, after v0.7.0).

Not here: top-k and top-p filtering, which raise NotImplementedError; DTensors, which raise TypeError, with
`get_logprobs_from_vocab_parallel_logits`, which takes them.

Differences that all functions have: targets of -100 give 0. A target that is neither in the vocabulary nor -100 gives
NaN, where NeMo-RL gives 0 on several ranks.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fp32.integrations.sequences import (
    gather_sequence,
    next_tokens,
    packed_positions,
    unpacked,
    whole_positions,
)
from megatron_fp32.integrations.tokens import hidden_logprobs, stored_entropy, stored_logprobs, world_if_none
from megatron_fp32.ops.logprobs import VocabParallel
from megatron_fp32.ops.products.operands import check_plain
from megatron_fp32.validation import check_count, check_flag


def from_parallel_logits_to_logprobs(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: dist.ProcessGroup | None,
    inference_only: bool = False,
    cp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
) -> Tensor:
    """Log-probs of the next tokens, float32 [batch, tokens - 1].

    Without `chunk_size`, NeMo-RL keeps an fp32 softmax of all tokens for the backward pass; here nothing of that size
    is kept in addition to the logits.

    Args:
        vocab_parallel_logits: [batch, padded tokens / cp, vocab / tp], bfloat16, float16 or float32. They are not
            changed. With several context-parallel ranks, this rank's two parts of each sequence.
        target: [batch, tokens], the tokens themselves: this function shifts them.
        vocab_start_index: the first column of this rank.
        vocab_end_index: the column after the last one of this rank.
        tp_group: the tensor-parallel ranks. None for all ranks where torch.distributed is initialized.
        inference_only: the result has no gradient.
        cp_group: the context-parallel ranks; None for one.
        chunk_size: places of dimension 1 at a time; None chooses.
        sampling_params: None, or an object whose `top_k` and `top_p` do not filter.

    Raises:
        TypeError, ValueError: as `logprobs_from_logits`; and for columns that are not those of the rank, or more
            targets than logits.
        NotImplementedError: for `sampling_params` that filter.
    """
    group = _checked(vocab_parallel_logits, vocab_start_index, vocab_end_index, tp_group, sampling_params)
    check_flag("inference_only", inference_only)
    ranks = 1 if cp_group is None else dist.get_world_size(cp_group)
    tokens, padded = target.shape[1], vocab_parallel_logits.shape[1] * ranks
    if tokens > padded or len(target) != len(vocab_parallel_logits):
        raise ValueError(
            f"expected a target of {len(vocab_parallel_logits)} sequences of at most {padded} tokens, got "
            f"{tuple(target.shape)}"
        )
    labels = torch.nn.functional.pad(target.roll(-1, 1), (0, padded - tokens))
    if ranks > 1:
        positions = whole_positions(padded, ranks, target.device)
        labels = labels[:, positions[dist.get_rank(cp_group)]]
    logprobs = _token_logprobs(vocab_parallel_logits, labels, group, chunk_size, inference_only)
    if ranks > 1:
        assert cp_group is not None
        logprobs = gather_sequence(logprobs, positions, cp_group)
    return logprobs[:, : max(0, tokens - 1)]


def from_parallel_logits_to_logprobs_packed_sequences(
    vocab_parallel_logits: Tensor,
    target: Tensor,
    cu_seqlens_padded: Tensor,
    unpacked_seqlen: int,
    vocab_start_index: int,
    vocab_end_index: int,
    group: dist.ProcessGroup | None,
    inference_only: bool = False,
    cp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    sampling_params: Any = None,
    target_is_pre_rolled: bool = False,
) -> Tensor:
    """Log-probs of the next tokens of packed sequences, float32 [sequences, unpacked_seqlen - 1], then zeros.

    NeMo-RL's function makes the host wait for the device, twice for each sequence. Here it does not wait.

    Args:
        vocab_parallel_logits: [1, tokens / cp, vocab / tp], as for `from_parallel_logits_to_logprobs`.
        target: [1, tokens], the tokens themselves; or, with `target_is_pre_rolled`, this rank's labels
            [1, tokens / cp].
        cu_seqlens_padded: [sequences + 1], where each sequence begins and the last one ends, in the whole pack; with
            several context-parallel ranks, multiples of twice their number.
        unpacked_seqlen: how long the rows are, plus one.
        vocab_start_index: as for `from_parallel_logits_to_logprobs`. The others likewise.
        vocab_end_index: the column after the last one of this rank.
        group: the tensor-parallel ranks.
        inference_only: the result has no gradient.
        cp_group: the context-parallel ranks; None for one.
        chunk_size: tokens at a time; None chooses.
        sampling_params: None, or an object whose `top_k` and `top_p` do not filter.
        target_is_pre_rolled: the target is shifted, and cut over the ranks, already.

    Raises:
        As `from_parallel_logits_to_logprobs`; and ValueError for more than one pack, or a target of another length.
    """
    ranks_of_vocab = _checked(vocab_parallel_logits, vocab_start_index, vocab_end_index, group, sampling_params)
    check_flag("inference_only", inference_only)
    check_flag("target_is_pre_rolled", target_is_pre_rolled)
    check_count("unpacked_seqlen", unpacked_seqlen)
    ranks = 1 if cp_group is None else dist.get_world_size(cp_group)
    local = vocab_parallel_logits.shape[1]
    expected = (1, local if target_is_pre_rolled else local * ranks)
    if len(vocab_parallel_logits) != 1 or tuple(target.shape) != expected:
        raise ValueError(
            f"expected logits [1, tokens / cp, vocab / tp] and a target {expected}, got "
            f"{tuple(vocab_parallel_logits.shape)} and {tuple(target.shape)}"
        )
    boundaries = cu_seqlens_padded.to(target.device, non_blocking=True)
    positions = packed_positions(boundaries, local * ranks, ranks)
    labels = target
    if not target_is_pre_rolled:
        # One label more, for tokens of no sequence.
        labels = torch.nn.functional.pad(next_tokens(target[0], boundaries), (0, 1))[None]
        labels = labels[:, positions[0 if ranks == 1 else dist.get_rank(cp_group)]]
    logprobs = _token_logprobs(vocab_parallel_logits, labels, ranks_of_vocab, chunk_size, inference_only)
    if ranks > 1:
        assert cp_group is not None
        logprobs = gather_sequence(logprobs, positions, cp_group)
    return unpacked(logprobs[0], boundaries, unpacked_seqlen - 1)


def get_next_token_logprobs_from_logits(
    input_ids: Tensor,
    next_token_logits: Tensor,
    seq_index: Tensor | None = None,
    vocab_parallel_rank: int | None = None,
    vocab_parallel_group: dist.ProcessGroup | None = None,
    context_parallel_group: dist.ProcessGroup | None = None,
    sampling_params: Any = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probs of the next tokens, float32 [batch, tokens - 1].

    NeMo-RL makes an fp32 copy of the logits where it does not work in chunks. Here there is none.

    Args:
        input_ids: [batch, tokens], the tokens themselves.
        next_token_logits: [batch, tokens, vocab] in one process, or what `from_parallel_logits_to_logprobs` takes.
        seq_index: must be None: it belongs to DTensors.
        vocab_parallel_rank: this rank among the tensor-parallel ranks; needed with their group.
        vocab_parallel_group: the tensor-parallel ranks; None for one process.
        context_parallel_group: the context-parallel ranks; used with `vocab_parallel_group` only.
        sampling_params: None, or an object whose `top_k` and `top_p` do not filter.
        chunk_size: places of dimension 1 at a time; None chooses.

    Raises:
        As `from_parallel_logits_to_logprobs`; and ValueError for a `seq_index`, or a group without the rank.
    """
    if seq_index is not None:
        raise ValueError("seq_index must be None: it belongs to DTensors, which are not taken here")
    columns = next_token_logits.shape[-1]
    if vocab_parallel_group is not None:
        if vocab_parallel_rank is None:
            raise ValueError("vocab_parallel_rank must be given with vocab_parallel_group, got None")
        return from_parallel_logits_to_logprobs(
            next_token_logits,
            input_ids,
            vocab_parallel_rank * columns,
            (vocab_parallel_rank + 1) * columns,
            vocab_parallel_group,
            cp_group=context_parallel_group,
            chunk_size=chunk_size,
            sampling_params=sampling_params,
        )
    _check_plain_and_unfiltered(next_token_logits, sampling_params)
    # Of all tokens, so that the logits' rows stay dense in memory.
    labels = input_ids.to(next_token_logits.device).roll(-1, 1)
    return _token_logprobs(next_token_logits, labels, None, chunk_size, False)[:, :-1]


def from_parallel_hidden_states_to_logprobs(
    tensor_parallel_hidden_states: Tensor,
    output_weight_layer: Tensor,
    runtime_gather_output: bool | None,
    target: Tensor,
    vocab_start_index: int,
    vocab_end_index: int,
    tp_group: dist.ProcessGroup | None,
    inference_only: bool = False,
    cp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probs of the next tokens, float32 [batch, tokens - 1], from hidden states.

    NeMo-RL rounds the logits to the hidden states' dtype, and sums dW over the chunks in the weight's. Here the logits
    are fp32, and dW goes to the weight's `main_grad` in fp32, where it has one (see `fp32_logits`).

    Args:
        tensor_parallel_hidden_states: [tokens / tp, batch, hidden]: with several tensor-parallel ranks, sequence
            parallelism is on, as NeMo-RL's function takes for granted.
        output_weight_layer: [vocab / tp, hidden].
        runtime_gather_output: not used, as in NeMo-RL.
        target: [batch, tokens], the tokens themselves: this function shifts them.
        vocab_start_index: the first column of this rank.
        vocab_end_index: the column after the last one of this rank.
        tp_group: the tensor-parallel ranks. None for all ranks where torch.distributed is initialized.
        inference_only: the result has no gradient.
        cp_group: must have one rank, as in NeMo-RL.
        chunk_size: tokens at a time; None, which NeMo-RL's function does not take, chooses.

    Raises:
        TypeError, ValueError: as `linear_logprobs`; and for rows of the weight that are not those of the rank, or
            several context-parallel ranks.
    """
    check_flag("inference_only", inference_only)
    if cp_group is not None and dist.get_world_size(cp_group) > 1:
        raise ValueError(f"cp_group must be None or have one rank, got {dist.get_world_size(cp_group)} ranks")
    group = world_if_none(tp_group)
    _check_columns(output_weight_layer.shape[0], vocab_start_index, vocab_end_index, group)
    with torch.no_grad() if inference_only else contextlib.nullcontext():
        logprobs, _ = hidden_logprobs(
            tensor_parallel_hidden_states,
            output_weight_layer,
            target.roll(-1, 1).t(),
            vocab_parallel=VocabParallel(group=group, sequence_parallel=True),
            chunk_size=None if chunk_size is None else chunk_size * len(target),
        )
    return logprobs.t()[:, :-1].contiguous()


class ChunkedDistributedEntropy:
    """Stands for NeMo-RL's autograd function of this name: call `apply`."""

    @staticmethod
    def apply(
        vocab_parallel_logits: Tensor, chunk_size: int, tp_group: dist.ProcessGroup | None, inference_only: bool = False
    ) -> Tensor:
        """The sum of p log p, which is **minus** the entropy, as in NeMo-RL: float32 [batch, tokens].

        Args:
            vocab_parallel_logits: [batch, tokens, vocab / tp], bfloat16, float16 or float32. They are not changed.
            chunk_size: places of dimension 1 at a time.
            tp_group: the tensor-parallel ranks. None for all ranks where torch.distributed is initialized.
            inference_only: the result has no gradient.

        Raises:
            TypeError, ValueError: as `logprobs_from_logits`; and for a `chunk_size` below 1.
        """
        check_flag("inference_only", inference_only)
        size = _tokens(chunk_size, vocab_parallel_logits)
        with torch.no_grad() if inference_only else contextlib.nullcontext():
            return -stored_entropy(vocab_parallel_logits, group=world_if_none(tp_group), chunk_size=size)


def _token_logprobs(
    logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None, chunk_size: int | None, inference_only: bool
) -> Tensor:
    with torch.no_grad() if inference_only else contextlib.nullcontext():
        return stored_logprobs(logits, labels, group=group, chunk_size=_tokens(chunk_size, logits))[0]


def _tokens(chunk_size: int | None, logits: Tensor) -> int | None:
    """Chunks are of dimension 1 in NeMo-RL, and of tokens here."""
    if chunk_size is None:
        return None
    check_count("chunk_size", chunk_size)
    return max(1, chunk_size * len(logits))


def _checked(
    logits: Tensor, begin: int, end: int, group: dist.ProcessGroup | None, sampling_params: Any
) -> dist.ProcessGroup | None:
    """The tensor-parallel group, where the arguments can be honoured."""
    _check_plain_and_unfiltered(logits, sampling_params)
    whole = world_if_none(group)
    _check_columns(logits.shape[-1], begin, end, whole)
    return whole


def _check_plain_and_unfiltered(logits: Tensor, sampling_params: Any) -> None:
    check_plain(logits=logits)
    if logits.dim() != 3:
        raise ValueError(f"expected logits of three dimensions [batch, tokens, vocab / tp], got {tuple(logits.shape)}")
    if sampling_params is None:
        return
    top_k, top_p = sampling_params.top_k, sampling_params.top_p
    if (top_k is not None and top_k > 0) or (top_p is not None and top_p != 1.0):
        raise NotImplementedError(
            f"log-probs after top-k or top-p filtering are not computed here, got top_k={top_k}, top_p={top_p}: use "
            "NeMo-RL's own function for them"
        )


def _check_columns(columns: int, begin: int, end: int, group: dist.ProcessGroup | None) -> None:
    rank = 0 if group is None else dist.get_rank(group)
    if (begin, end) != (rank * columns, (rank + 1) * columns):
        raise ValueError(
            f"expected vocab_start_index {rank * columns} and vocab_end_index {(rank + 1) * columns} on rank {rank} "
            f"with {columns} columns, got {begin} and {end}"
        )
