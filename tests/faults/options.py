"""Faults of the options of the head without logits: reductions, ignored labels, metrics, bias, an fp32 weight."""

from __future__ import annotations

from faults.mutant import Mutant

REDUCTION = "tests/ops/test_reduction.py"
METRICS = "tests/ops/test_metrics.py"
BIAS = "tests/ops/test_bias.py"
FP32_WEIGHT = "tests/ops/test_fp32_weight.py"

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
        test=f"{METRICS}::test_an_ignored_label_of_the_vocabulary_is_not_correct",
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
    Mutant(
        name="multiply again without the bias",
        file="ops/logprobs/accumulate.py",
        old="bias = None if self._bias is None else self._bias[rows]",
        new="bias = None",
        test=f"{BIAS}::test_against_float64",
    ),
    Mutant(
        name="add the bias of other columns",
        file="ops/logprobs/accumulate.py",
        old="self._bias[rows]",
        new="self._bias[: rows.stop - rows.start]",
        test=f"{BIAS}::test_chunks_of_columns",
    ),
    Mutant(
        name="take the statistics without the bias",
        file="ops/logprobs/statistics.py",
        old="raw = logits_product(hidden, weight, bias, fixed_order=fixed)",
        new="raw = logits_product(hidden, weight, fixed_order=fixed)",
        test=f"{BIAS}::test_against_float64",
    ),
    Mutant(
        name="sum one piece of dY for the bias",
        file="ops/products/bias_grad.py",
        old="reversed(grad.parts)",
        new="grad.parts[:1]",
        test=f"{BIAS}::test_the_gradient_is_the_sum_of_the_dy_that_dw_sees",
    ),
    Mutant(
        name="leave the scale in the gradient of a bias",
        file="ops/products/bias_grad.py",
        old="total if grad.inverse_scale is None else total * grad.inverse_scale",
        new="total",
        test=f"{BIAS}::test_against_float64",
    ),
    Mutant(
        name="forget the bias of a chunk of tokens",
        file="ops/products/bias_grad.py",
        old="self._sum[rows] += total",
        new="self._sum[rows] = total",
        test=f"{BIAS}::test_against_float64",
    ),
    Mutant(
        name="need no dY for a bias alone",
        file="ops/logprobs/weighted.py",
        old=" and self._bias_grad is None",
        new="",
        test=f"{BIAS}::test_one_gradient_alone",
    ),
    Mutant(
        name="multiply two pieces of an fp32 weight",
        file="ops/products/forward.py",
        old="pieces = split(weight[rows], 3, hidden.dtype)",
        new="pieces = split(weight[rows], 2, hidden.dtype)",
        test=f"{FP32_WEIGHT}::test_logits_to_the_level_of_the_accumulator",
    ),
    Mutant(
        name="make dX of two pieces of an fp32 weight",
        file="ops/products/hidden_grad.py",
        old="split(weight[rows], 3, dtype)",
        new="split(weight[rows], 2, dtype)",
        test=f"{FP32_WEIGHT}::test_dx_of_the_pieces_that_dy_has",
    ),
    Mutant(
        name="begin dX again with every part of a split weight",
        file="ops/products/hidden_grad.py",
        old="accumulate=columns.start + rows.start > 0",
        new="accumulate=columns.start > 0",
        test=f"{FP32_WEIGHT}::test_dx_of_the_pieces_that_dy_has",
    ),
    Mutant(
        name="split an fp32 weight as a whole",
        file="ops/products/forward.py",
        old="for rows in even_chunks(weight.shape[0], CHUNK):",
        new="for rows in even_chunks(weight.shape[0], weight.shape[0]):",
        test=f"{FP32_WEIGHT}::test_no_second_copy_of_the_weight",
    ),
    Mutant(
        name="split an fp32 weight as a whole for dX",
        file="ops/products/hidden_grad.py",
        old="largest = CHUNK if weight.dtype != dtype else count",
        new="largest = count",
        test=f"{FP32_WEIGHT}::test_no_second_copy_of_the_weight",
    ),
    Mutant(
        name="keep one piece of dY beside an fp32 weight",
        file="ops/logprobs/options.py",
        old="piece_dtype(hidden.dtype, weight.dtype) != torch.float32",
        new="weight.dtype != torch.float32",
        test=f"{FP32_WEIGHT}::test_without_logits_against_float64",
    ),
    Mutant(
        name="defer dW of mixed operands",
        file="ops/logits/autograd.py",
        old="    if piece_dtype(hidden.dtype, weight.dtype) != weight.dtype:\n        raise",
        new="    if False:\n        raise",
        test=f"{FP32_WEIGHT}::test_what_is_refused",
    ),
]
