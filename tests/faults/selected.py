"""Faults of the log-probs of several tokens and of truncated samplers."""

from __future__ import annotations

from faults.mutant import Mutant

SELECTED = "tests/ops/test_selected.py"
TRUNCATED = "tests/ops/test_truncated.py"
SLOTS = "ops/logprobs/slots.py"

SELECTED_TOKENS = [
    Mutant(
        name="count a token twice that is given twice",
        file=SLOTS,
        old="begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]",
        new="pass",
        test=f"{SELECTED}::test_results",
    ),
    Mutant(
        name="give each of two equal slots its own gradient alone",
        file=SLOTS,
        old="        same = keys[:, step:] == keys[:, :-step]\n",
        new="        same = torch.zeros_like(keys[:, step:], dtype=torch.bool)\n",
        test=f"{SELECTED}::test_gradients",
    ),
    Mutant(
        name="take the rest's log-prob as a difference",
        file=SLOTS,
        old="torch.where(rest > sum_chosen, -(sum_chosen / rest).log1p(), below + rest_sum.log() - log_sum)",
        new="(1 - (sum_chosen / total).float()).log().double()",
        test=f"{SELECTED}::test_probabilities_near_one_and_zero_keep_their_digits",
    ),
    Mutant(
        name="take 1 - p of the largest token as a difference",
        file=SLOTS,
        old="rest_of_slot = torch.where(is_largest, others[:, None], total[:, None] - (z - top[:, None]).exp())",
        new="rest_of_slot = total[:, None] - (z - top[:, None]).exp()",
        test=f"{SELECTED}::test_probabilities_near_one_and_zero_keep_their_digits",
    ),
    Mutant(
        name="write a slot's gradient into the first column of another chunk",
        file="ops/logprobs/selected.py",
        old="columns = torch.where(here, self._local, self._local.gather(1, place)) - rows.start",
        new="columns = (self._local - rows.start).clamp(0, rows.stop - rows.start - 1)",
        test=f"{SELECTED}::test_chunks_of_the_vocabulary",
    ),
    Mutant(
        name="leave the soft cap out of the chosen tokens' gradient",
        file=SLOTS,
        old="    if statistics.products is not None:\n",
        new="    if False:\n",
        test=f"{SELECTED}::test_gradients",
    ),
    Mutant(
        name="let an unknown token have a gradient of zero",
        file=SLOTS,
        old="torch.where(outside.any(1), torch.nan, 0.0)",
        new="0.0",
        test=f"{SELECTED}::test_a_gradient_of_a_token_that_is_not_there_is_nan",
    ),
    Mutant(
        name="give tokens below the threshold a gradient",
        file="ops/logprobs/gradient.py",
        old="    if cuts is not None:\n        grad = torch.where(z < cuts[:, None], 0.0, grad)\n",
        new="",
        test=f"{TRUNCATED}::test_tokens_that_are_not_kept_get_nothing",
    ),
    Mutant(
        name="drop the label where it is below the threshold",
        file="ops/logprobs/threshold.py",
        old=" & (columns != softmax.shard.local_labels(labels)[:, None])",
        new="",
        test=f"{TRUNCATED}::test_a_label_alone",
    ),
    Mutant(
        name="keep all tokens for a threshold of NaN",
        file="ops/logprobs/threshold.py",
        old="wrong = cut.isnan() & (y != softmax.ignore_index)",
        new="wrong = torch.zeros_like(cut, dtype=torch.bool)",
        test=f"{TRUNCATED}::test_what_is_wrong_with_one_token_stays_there",
    ),
    Mutant(
        name="take the mass of a threshold from a difference",
        file="ops/logprobs/threshold.py",
        old="torch.where(of_dropped < 0.5, (-of_dropped).log1p(), difference)",
        new="difference",
        test=f"{TRUNCATED}::test_a_mass_of_almost_one_keeps_its_digits",
    ),
    Mutant(
        name="renormalize top-p over the whole vocabulary",
        file="ops/logprobs/thresholds.py",
        old="e = torch.where(z < cut[:, None], 0.0, (z - of.top[:, None]).exp())",
        new="e = (z - of.top[:, None]).exp()",
        test=f"{TRUNCATED}::TestThresholds",
    ),
    Mutant(
        name="put the threshold on the least probable kept token",
        file="ops/logprobs/thresholds.py",
        old="torch.where(other.isneginf(), other, (least + other) / 2)",
        new="torch.where(other.isneginf(), other, least + (other - least) * 1.5)",
        test=f"{TRUNCATED}::TestThresholds",
    ),
]
