"""Faults of results that leave a Megatron model in place of its logits."""

from __future__ import annotations

from faults.mutant import Mutant

RETURNING = "tests/output_layer/test_returning.py"
BLOCKS = "tests/output_layer/test_returning_blocks.py"
RANKS = "tests/output_layer/test_returning_ranks.py"
FILE = "results.py"
REQUESTS = "output_layer/requests.py"

RETURNED_RESULTS = [
    Mutant(
        name="take a depth of multi-token prediction for the model",
        file=FILE,
        old="            if labels is self._labels:\n",
        new="            if True:\n",
        test=f"{RETURNING}::test_a_model_trains_as_on_its_loss[mtp-logits]",
    ),
    Mutant(
        name="compute no logits for a depth of multi-token prediction",
        file=FILE,
        old="                logits = logits.logits()\n",
        new="                pass\n",
        test=f"{RETURNING}::test_a_model_trains_as_on_its_loss[mtp-logits]",
    ),
    Mutant(
        name="forget the scale of results",
        file=FILE,
        old="compute(layer, hidden, weight, labels, self._scale)",
        new="compute(layer, hidden, weight, labels, 1.0)",
        test=f"{RETURNING}::test_mup",
    ),
    Mutant(
        name="drop the fused loss after a block",
        file=FILE,
        old="            if own is not None:\n",
        new="            if False:\n",
        test=f"{BLOCKS}::TestTheBlock::test_it_leaves_no_trace",
    ),
    Mutant(
        name="leave a hook behind",
        file=FILE,
        old="                hook.remove()\n",
        new="                pass\n",
        test=f"{BLOCKS}::TestTheBlock::test_it_leaves_no_trace",
    ),
    Mutant(
        name="say nothing where no results were computed",
        file=FILE,
        old="        if self._results != 1:\n",
        new="        if False:\n",
        test=f"{BLOCKS}::TestTheBlock::test_a_model_that_changes_its_labels",
    ),
    Mutant(
        name="read labels of another forward pass",
        file=FILE,
        old="        if not self._running:\n",
        new="        if False:\n",
        test=f"{BLOCKS}::TestTheBlock::test_a_model_that_ran_without_its_hooks",
    ),
    Mutant(
        name="take the name of a chunk for a LoRA wrapper",
        file="output_layer/fused_loss.py",
        old='wrapped = not name.endswith("output_layer")',
        new='wrapped = name.rpartition(".")[2] != "output_layer"',
        test="tests/output_layer/test_fused_loss.py::TestOneProcess::test_chunks_of_a_virtual_pipeline",
    ),
    Mutant(
        name="leave temperatures in the order of the batch",
        file=REQUESTS,
        old="temperature=torch.atleast_2d(temperature).t() if isinstance(temperature, Tensor) else temperature",
        new="temperature=temperature",
        test=f"{RETURNING}::test_results_and_gradients[labels-gpt-logits]",
    ),
    Mutant(
        name="leave given tokens in the order of the batch",
        file=REQUESTS,
        old="linear_selected_logprobs(hidden, weight, sequence_first(self.tokens), **options)",
        new="linear_selected_logprobs(hidden, weight, self.tokens.view(*hidden.shape[:2], -1), **options)",
        test=f"{RETURNING}::test_results_and_gradients[tokens-gpt-logits]",
    ),
    Mutant(
        name="compute a rank's log-probs alone",
        file=REQUESTS,
        old="            **layer.operator_arguments(),\n",
        new='            **{**layer.operator_arguments(), "vocab_parallel": None},\n',
        test=f"{RANKS}::test_tensor_parallel[TP2-labels]",
    ),
    Mutant(
        name="forget what comes after the loss function",
        file=REQUESTS,
        old="grad_scale=self.grad_scale",
        new="grad_scale=1.0",
        test=f"{RANKS}::test_a_schedule[weights-mean]",
    ),
]
