"""Faults of `linear_distillation`."""

from __future__ import annotations

from faults.mutant import Mutant

TESTS = "tests/ops/test_distillation.py"
EDGES = "tests/ops/test_distillation_edges.py"
CLOSE = f"{TESTS}::TestCloseToTheTeacher"
MASKED = f"{EDGES}::TestTokensThatDoNotCount"
EXTREMES = f"{TESTS}::TestExtremes"
EXACT = f"{TESTS}::TestAgainstFloat64"
AUTOGRAD = f"{EDGES}::TestAutograd"
KERNELS = "tests/ops/test_distillation_kernels.py"
RANKS = "tests/ops/test_distillation_ranks.py"


def _fault(name: str, file: str, old: str, new: str, test: str) -> Mutant:
    return Mutant(name=name, file=f"ops/logprobs/{file}.py", old=old, new=new, test=test)


DISTILLATION = [
    _fault(
        "sum a KL from terms of both signs",
        "divergence",
        "torch.where(near, q * psi(-d), excess + _times(q, d))",
        "_times(q, d)",
        CLOSE,
    ),
    _fault(
        "take psi from an exponential",
        "divergence",
        "return t * t * series",
        "return t.expm1() - t",
        CLOSE,
    ),
    _fault(
        "leave the error of the logsumexps in the gradient",
        "divergence_gradient",
        "differences(raw, teacher_raw, pair, vectors) - correction[:, None]",
        "differences(raw, teacher_raw, pair, vectors)",
        CLOSE,
    ),
    _fault(
        "leave the error of the logsumexps in the divergence",
        "divergence",
        "(rest.pop(0) - (excess + c)).clamp(min=0)",
        "rest.pop(0).clamp(min=0)",
        CLOSE,
    ),
    _fault(
        "leave the error of the logsumexps in the reverse KL",
        "divergence",
        "(rest.pop(0) - (c.expm1() - c)).clamp(min=0)",
        "rest.pop(0).clamp(min=0)",
        CLOSE,
    ),
    _fault(
        "leave the error of the logsumexps in the teacher's part of the JSD",
        "divergence",
        "(rest.pop(0) - (1 - beta) ** 2 * half).clamp(min=0)",
        "rest.pop(0).clamp(min=0)",
        CLOSE,
    ),
    _fault(
        "take log q - log p from rounded log-probs",
        "divergence",
        "return ((y - z) - (teacher_top - top)[:, None]) - shift[:, None]",
        "return (y - teacher_top[:, None] - vectors[4, :, None]) - (z - top[:, None] - vectors[1, :, None])",
        CLOSE,
    ),
    _fault(
        "add the logits' difference to that of the log sums before it is taken away",
        "divergence",
        "return ((y - z) - (teacher_top - top)[:, None]) - shift[:, None]",
        "return (y - z) - ((teacher_top - top) + shift)[:, None]",
        EXTREMES,
    ),
    _fault(
        "swap teacher and student in the mixture",
        "divergence",
        "log_ratio_of_mixture(-d, 1 - beta, beta), log_ratio_of_mixture(d, beta, 1 - beta)",
        "log_ratio_of_mixture(-d, beta, 1 - beta), log_ratio_of_mixture(d, 1 - beta, beta)",
        EXACT,
    ),
    _fault(
        "multiply an impossible token's infinite log by its probability of 0",
        "divergence",
        "return torch.where(probability == 0, 0.0, probability * x)",
        "return probability * x",
        EXTREMES,
    ),
    _fault(
        "multiply an infinite slope by a probability of 0",
        "divergence_gradient",
        "torch.where(p == 0, 0.0, p * (d + reverse))",
        "p * (d + reverse)",
        EXTREMES,
    ),
    _fault(
        "give a token that does not count its divergence",
        "distillation_forward",
        "(torch.where(ignored, 0.0, field) for field in finish(sums, pair.divergence))",
        "(torch.where(ignored, 0.0 * field, field) for field in finish(sums, pair.divergence))",
        MASKED,
    ),
    _fault(
        "let a token that does not count have a gradient",
        "distillation",
        "g = torch.where(labels == plan.pair.student.ignore_index, 0.0, g)",
        "pass",
        MASKED,
    ),
    _fault(
        "let a NaN teacher into the log-prob's gradient",
        "divergence_gradient",
        "grad = torch.where(of_divergence[:, None], grad, 0.0)",
        "pass",
        MASKED,
    ),
    _fault(
        "multiply an upstream gradient of 0 of a log-prob by an infinite logit",
        "divergence_gradient",
        "torch.where(of_label[:, None], own * inverse_temperature[:, None], 0.0)",
        "own * inverse_temperature[:, None]",
        EXTREMES,
    ),
    _fault(
        "sum over the padding",
        "divergence",
        "torch.where(valid, term, 0.0)",
        "term",
        MASKED,
    ),
    _fault(
        "take the log-prob at the divergence's temperature",
        "distillation_forward",
        "student if plan.same_temperature else",
        "student if True else",
        EXACT,
    ),
    _fault(
        "use the student's soft cap for the teacher",
        "distillation",
        "teacher=dataclasses.replace(options.softmax, transform=transform)",
        "teacher=options.softmax",
        EXACT,
    ),
    _fault(
        "bound dY by less than it is",
        "divergence_gradient",
        "return split_scale(bounds, count, dtype)",
        "return split_scale(bounds * 2.0**-8, count, dtype)",
        EXACT,
    ),
    _fault(
        "forget the blocks of tokens before the last in dW",
        "accumulate",
        "weight_grad=sums.part(first=tokens is blocks[0])",
        "weight_grad=sums.part(first=True)",
        AUTOGRAD,
    ),
    _fault(
        "take a teacher with a gradient",
        "distillation",
        "if torch.is_grad_enabled() and (teacher_hidden.requires_grad or teacher_weight.requires_grad):",
        "if False:",
        f"{EDGES}::TestRefusals",
    ),
    _fault(
        "sum the divergence over one rank's words",
        "distillation_forward",
        "for rank in range(1, shard.ranks):",
        "for rank in range(0):",
        RANKS,
    ),
    _fault(
        "take psi from an exponential in the kernels",
        "distillation_kernels",
        "return t * t * (series * t + 0.5)",
        "return tl.exp(t) - 1.0 - t",
        KERNELS,
    ),
    _fault(
        "leave the error of the logsumexps in the kernel's gradient",
        "distillation_kernels",
        "_difference(z, y, top, teacher_top, shift) - correction",
        "_difference(z, y, top, teacher_top, shift)",
        KERNELS,
    ),
    _fault(
        "multiply an impossible token's infinite log by its probability of 0 in the kernels",
        "distillation_kernels",
        "return tl.where(probability == 0.0, 0.0, probability * x)",
        "return probability * x",
        KERNELS,
    ),
    _fault(
        "let a NaN teacher into the kernel's log-prob gradient",
        "distillation_kernels",
        "grad = tl.where(live, grad * inverse, 0.0)",
        "grad = grad * inverse",
        KERNELS,
    ),
    _fault(
        "sum over the padding in the kernel",
        "distillation_kernels",
        "tl.sum(tl.where(valid, term, 0.0), 1)",
        "tl.sum(term, 1)",
        KERNELS,
    ),
]
