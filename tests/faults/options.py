"""Faults of the options of the head without logits: reductions, ignored labels, metrics, bias, an fp32 weight."""

from __future__ import annotations

from faults.mutant import Mutant

REDUCTION = "tests/ops/test_reduction.py"
METRICS = "tests/ops/test_metrics.py"

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
    Mutant(
        name="let a log-prob say which token is the largest",
        file="ops/logprobs/statistics.py",
        old="(label_logits >= statistics[0, 0])",
        new="(done.logprob >= -done.log_sum)",
        test=f"{METRICS}::test_a_rival_that_is_next_to_the_label",
    ),
    Mutant(
        name="call ties wrong",
        file="ops/logprobs/statistics.py",
        old="(label_logits >= statistics[0, 0])",
        new="(label_logits > statistics[0, 0])",
        test=f"{METRICS}::test_labels_that_are_the_most_probable_tokens",
    ),
    Mutant(
        name="call a label right whose loss is NaN",
        file="ops/logprobs/statistics.py",
        old=" & ~done.logprob.isnan()",
        new="",
        test=f"{METRICS}::test_an_infinite_logit_is_no_maximum",
    ),
    Mutant(
        name="call an ignored label right",
        file="ops/logprobs/statistics.py",
        old="softmax.knows(labels) & largest",
        new="largest",
        test=f"{METRICS}::test_labels_that_are_the_most_probable_tokens",
    ),
    Mutant(
        name="know the ignored token of the vocabulary",
        file="ops/logprobs/softmax.py",
        old=" & (labels != self.ignore_index)",
        new="",
        test=f"{METRICS}::test_an_ignored_label_of_the_vocabulary_is_not_correct",
    ),
    Mutant(
        name="refuse a token of the vocabulary as ignore_index",
        file="ops/logprobs/options.py",
        old='check_count("ignore_index", ignore_index, least=-(2**63))',
        new='check_count("ignore_index", ignore_index, least=weight.shape[0])',
        test="tests/ops/test_ignore_index.py::test_against_float64",
    ),
]
