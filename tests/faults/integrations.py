"""Faults of `integrations/`, and of the operator on stored logits that it stands on."""

from __future__ import annotations

from faults.mutant import Mutant

STORED = "tests/ops/test_logprobs_from_logits.py"
STORED_RANKS = "tests/ops/test_logprobs_from_logits_ranks.py"
ALONE = "tests/integrations/test_one_process.py"
RANKS = "tests/integrations/test_ranks.py"

INTEGRATIONS = [
    Mutant(
        name="number the rows in the order of the shape",
        file="ops/logprobs/stored_rows.py",
        old="key=lambda dim: -strides[dim]",
        new="key=lambda dim: dim",
        test=f"{STORED}::test_rows_are_found_in_the_order_of_memory",
    ),
    Mutant(
        name="give tokens their results in the order of memory",
        file="ops/logprobs/stored_rows.py",
        old="out.permute(self._order).copy_(values.view(self._shape))",
        new="out.copy_(values.view(out.shape))",
        test=f"{STORED}::test_results_and_gradient",
    ),
    Mutant(
        name="write a gradient over rows that overlap",
        file="ops/logprobs/stored_rows.py",
        old="self._rows.stride(0) >= self.columns",
        new="True",
        test=f"{STORED}::test_rows_are_found_in_the_order_of_memory",
    ),
    Mutant(
        name="read the wrong rows where they are not dense",
        file="ops/logprobs/stored_rows.py",
        old="torch.arange(chunk.start, chunk.stop",
        new="torch.arange(0, chunk.stop - chunk.start",
        test=f"{STORED}::test_results_and_gradient",
    ),
    Mutant(
        name="round the gradient before its last step",
        file="ops/logprobs/gradient.py",
        old="parts = (out.copy_(parts[0]),)",
        new="parts = (out.copy_(parts[0].bfloat16()),)",
        test=f"{STORED}::test_results_and_gradient",
    ),
    Mutant(
        name="destroy the logits unasked",
        file="ops/logprobs/from_logits.py",
        old="rows.in_place() if options.inplace_backward else rows.like()",
        new="rows.in_place() if rows.writable else rows.like()",
        test=f"{STORED}::test_results_and_gradient",
    ),
    Mutant(
        name="destroy a parameter",
        file="ops/logprobs/from_logits.py",
        old="if logits.requires_grad and logits.is_leaf:",
        new="if False:",
        test=f"{STORED}::test_refused_arguments",
    ),
    Mutant(
        name="make an fp32 copy of all logits",
        file="ops/logprobs/from_logits.py",
        old="if rows.copied or not rows.is_cuda:",
        new="if False:",
        test=f"{STORED}::test_nothing_in_fp32_but_a_chunk",
    ),
    Mutant(
        name="believe ranks with different numbers of columns",
        file="ops/logprobs/from_logits.py",
        old="torch.where(even, inverse_temperature, torch.nan)",
        new="inverse_temperature",
        test=f"{STORED_RANKS}::test_results_of_uneven_ranks_are_nan_where_nobody_waits",
    ),
    Mutant(
        name="do not compare the numbers of columns",
        file="ops/products/shard.py",
        old="if not logits.is_cuda and (numbers",
        new="if False and (numbers",
        test=f"{STORED_RANKS}::test_ranks_with_different_numbers_of_columns",
    ),
    Mutant(
        name="take the label of tokens without one for a token",
        file="integrations/tokens.py",
        old="return torch.where(missing, 0.0, out.logprobs), out.entropy\n\n\ndef stored_entropy",
        new="return out.logprobs, out.entropy\n\n\ndef stored_entropy",
        test=f"{ALONE}::test_areal",
    ),
    Mutant(
        name="mask the label out",
        file="integrations/slime.py",
        old="keep = keep.scatter(1, place, keep.gather(1, place) | own[:, None])",
        new="keep = keep.clone()",
        test=f"{ALONE}::test_slime_with_a_mask",
    ),
    Mutant(
        name="restore another rank's label in the mask",
        file="integrations/slime.py",
        old="own = (local >= 0) & (local < columns)",
        new="own = torch.ones_like(local, dtype=torch.bool)",
        test=f"{RANKS}::test_from_logits",
    ),
    Mutant(
        name="take the masked logits' entropy",
        file="integrations/slime.py",
        old="if with_entropy and log_prob_keep_mask is not None:",
        new="if False:",
        test=f"{ALONE}::test_slime_with_a_mask",
    ),
    Mutant(
        name="sum verl's dX, which its caller sums again",
        file="integrations/verl.py",
        old="reduce_hidden_grad=False",
        new="reduce_hidden_grad=True",
        test=f"{RANKS}::test_verl_from_hidden_states",
    ),
    Mutant(
        name="return NeMo-RL's entropy with the usual sign",
        file="integrations/nemo_rl.py",
        old="return -stored_entropy(",
        new="return stored_entropy(",
        test=f"{ALONE}::test_nemo_rl_next_tokens_and_entropy",
    ),
    Mutant(
        name="let filtering parameters pass",
        file="integrations/nemo_rl.py",
        old="if (top_k is not None and top_k > 0) or (top_p is not None and top_p != 1.0):",
        new="if top_k is not None and top_k > 0:",
        test=f"{ALONE}::test_what_nemo_rl_cannot_have",
    ),
    Mutant(
        name="give the second part to the wrong context-parallel rank",
        file="integrations/sequences.py",
        old="2 * ranks - rank - 2) * part",
        new="2 * ranks - rank - 1) * part",
        test=f"{RANKS}::test_nemo_rl_from_logits",
    ),
    Mutant(
        name="keep one context-parallel rank's gradient",
        file="integrations/sequences.py",
        old="return every[:, dist.get_rank(ctx.group)].sum(0), None",
        new="return every[0, dist.get_rank(ctx.group)], None",
        test=f"{RANKS}::test_nemo_rl_from_logits",
    ),
    Mutant(
        name="roll a pack over the ends of its sequences",
        file="integrations/sequences.py",
        old="inside = place < (boundaries[1:] - boundaries[:-1] - 1)[:, None]",
        new="inside = place < (boundaries[1:] - boundaries[:-1])[:, None]",
        test=f"{ALONE}::test_nemo_rl_packed",
    ),
]
