"""Faults of the operators that compilers know."""

from __future__ import annotations

from faults.mutant import Mutant

TESTS = "tests/ops/test_logprobs_custom_op.py"
WHOLE = f"{TESTS}::test_a_whole_graph_computes_what_the_eager_functions_do"
OPERATOR = "ops/logprobs/custom_op.py"

COMPILED = [
    Mutant(
        name="let compiled top log-probs seem to have a gradient",
        file=OPERATOR,
        old="rest.pop(0).detach() if options.top_k > 0 else None",
        new="rest.pop(0) if options.top_k > 0 else None",
        test=WHOLE,
    ),
    Mutant(
        name="forget the gradient of the mean in compiled code",
        file=OPERATOR,
        old="grads[3] if ctx.with_mean else None",
        new="None",
        test=WHOLE,
    ),
    Mutant(
        name="declare other logits than the operator keeps",
        file=OPERATOR,
        old="dtype=torch.float32)[:, : weight.shape[0]])",
        new="dtype=torch.float32))",
        test=f"{TESTS}::test_the_operators_are_what_they_declare",
    ),
    Mutant(
        name="add a compiled gradient to main_grad",
        file="ops/logprobs/autograd.py",
        old="if is_traced(weight) and not follows_main_grad(weight):",
        new="if is_traced(weight):",
        test=f"{TESTS}::test_a_weight_with_main_grad_breaks_the_graph_and_gets_its_gradient",
    ),
    Mutant(
        name="lose the process group of a compiled operator",
        file=OPERATOR,
        old="_resolve_process_group(group) if group else None",
        new="None",
        test=f"{TESTS}::test_ranks",
    ),
]
