"""Faults of the options of the head without logits: reductions, ignored labels, metrics, bias, an fp32 weight."""

from __future__ import annotations

from faults.mutant import Mutant

REDUCTION = "tests/ops/test_reduction.py"

OPTIONS = [
    Mutant(
        name="count ignored tokens in a mean",
        file="ops/logprobs/reduction.py",
        old="valid = labels != ignore_index",
        new="valid = torch.ones_like(labels, dtype=torch.bool)",
        test=f"{REDUCTION}::test_against_float64",
    ),
    Mutant(
        name="divide by the tokens of one rank",
        file="ops/logprobs/reduction.py",
        old="dist.all_reduce(count, group=self.group)",
        new="pass",
        test=f"{REDUCTION}::test_the_shares_of_the_mean_over_ranks",
    ),
    Mutant(
        name="divide no losses by no tokens",
        file="ops/logprobs/reduction.py",
        old="count.clamp(min=1)",
        new="count",
        test=f"{REDUCTION}::test_no_valid_token",
    ),
    Mutant(
        name="sum losses in float32",
        file="ops/logprobs/reduction.py",
        old="tree_sum(losses.reshape(-1).double())",
        new="tree_sum(losses.reshape(-1))",
        test=f"{REDUCTION}::test_the_sum_is_as_good_as_rounding_it_once",
    ),
    Mutant(
        name="count the tokens of tensor-parallel ranks again",
        file="ops/logprobs/reduction.py",
        old="vocab_parallel.group is self.group",
        new="vocab_parallel.group is self",
        test=f"{REDUCTION}::test_groups_that_count_nothing_or_twice",
    ),
]
