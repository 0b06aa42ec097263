"""Faults of what a token may touch, of ranks, GPUs and memory, in `ops/logprobs` and the products below it."""

from __future__ import annotations

from faults.mutant import Mutant

HOSTILE = "tests/ops/test_hostile_tokens.py"
KERNELS = "tests/ops/test_logprobs_kernels.py"
TEMPERATURES = "tests/ops/test_temperatures.py"

TOKENS = [
    Mutant(
        name="take the logarithm of a NaN's bits",
        file="ops/logprobs/kernels.py",
        old="return tl.where(x - x == 0.0, log, x)",
        new="return log",
        test=KERNELS,
    ),
    Mutant(
        name="skip a NaN in the distances of a kernel",
        file="ops/products/project_triton.py",
        old="propagate_nan=tl.PropagateNan.ALL",
        new="propagate_nan=tl.PropagateNan.NONE",
        test="tests/ops/test_compiled_kernels.py",
    ),
    Mutant(
        name="write a masked token's dY in a kernel",
        file="ops/logprobs/kernels.py",
        old="(first + offsets < valid_columns)[None, :] & live",
        new="(first + offsets < valid_columns)[None, :]",
        test=KERNELS,
    ),
    Mutant(
        name="give an ignored token its entropy",
        file="ops/logprobs/statistics.py",
        old="torch.where(ignored, 0.0, field)",
        new="field",
        test=HOSTILE,
    ),
    Mutant(
        name="multiply an upstream gradient of 0 by a NaN",
        file="ops/logprobs/gradient.py",
        old="return torch.where(live, torch.stack(vectors), 0.0)",
        new="return torch.stack(vectors)",
        test=HOSTILE,
    ),
    Mutant(
        name="let hidden states of masked tokens into dW",
        file="ops/logprobs/accumulate.py",
        old="rows_where(live[tokens], x[tokens])",
        new="x[tokens]",
        test=HOSTILE,
    ),
    Mutant(
        name="let a NaN of the weight into dX of masked tokens",
        file="ops/logprobs/accumulate.py",
        old="grad.masked_fill_(~live[:, None], 0.0)",
        new="grad",
        test=HOSTILE,
    ),
    Mutant(
        name="multiply padding by zeros",
        file="ops/products/hidden_grad.py",
        old="max(0, min(columns.stop, self._valid) - columns.start)",
        new="len(weight)",
        test=HOSTILE,
    ),
    Mutant(
        name="let one token's NaN take the scale of the others",
        file="ops/products/split.py",
        old="torch.where(largest.isfinite(), largest, 0.0).max()",
        new="largest.max()",
        test=HOSTILE,
    ),
    Mutant(
        name="take a temperature of 0",
        file="ops/logprobs/options.py",
        old="torch.where((each > 0) & each.isfinite() & inverse.isfinite(), inverse, torch.nan)",
        new="inverse",
        test=HOSTILE,
    ),
    Mutant(
        name="round float64 temperatures before their reciprocal",
        file="ops/logprobs/options.py",
        old="if each.dtype != torch.float64:",
        new="if True:",
        test=TEMPERATURES,
    ),
    Mutant(
        name="take a temperature that is longer than the labels",
        file="ops/logprobs/options.py",
        old="all(a in (1, b) for a, b in zip(wide, labels.shape, strict=True))",
        new="all(1 in (a, b) or a == b for a, b in zip(wide, labels.shape, strict=True))",
        test=TEMPERATURES,
    ),
    Mutant(
        name="let an impossible label spoil the entropy's gradient",
        file="ops/logprobs/gradient.py",
        old="torch.where(softmax.knows(labels), at_label, 0.0)",
        new="at_label",
        test=HOSTILE,
    ),
    Mutant(
        name="multiply strides in 32 bits",
        file="ops/products/split_triton.py",
        old="index * tl.cast(part_stride, tl.int64)",
        new="index * part_stride",
        test="tests/ops/test_compiled_kernels.py",
    ),
    Mutant(
        name="let a double backward pass go by",
        file="ops/first_order.py",
        old="if not torch.is_grad_enabled():",
        new="if True:",
        test="tests/ops/test_logprobs.py::TestAutograd tests/ops/test_linear_cross_entropy.py::TestPerToken",
    ),
    Mutant(
        name="smooth with each block's own maximum",
        file="ops/logprobs/statistics.py",
        old="group[:, 3] + torch.where(group[:, 4] == 0, 0.0, group[:, 4] * distance)",
        new="group[:, 3]",
        test="tests/ops/test_linear_cross_entropy.py",
    ),
    Mutant(
        name="want the very scale",
        file="ops/logprobs/weighted.py",
        old="2.0**-20 * grad_scale.abs()",
        new="0.0 * grad_scale.abs()",
        test="tests/ops/test_linear_cross_entropy.py::TestWeighted",
    ),
    Mutant(
        name="take any scale",
        file="ops/logprobs/weighted.py",
        old="2.0**-20 * grad_scale.abs()",
        new="2.0**-18 * grad_scale.abs()",
        test="tests/ops/test_linear_cross_entropy.py::TestWeighted",
    ),
    Mutant(
        name="take shards of different sizes",
        file="ops/products/shard.py",
        old="if any(number != rows for number in numbers):",
        new="if False:",
        test="tests/ops/test_logprobs_ranks.py::test_shards_of_different_sizes",
    ),
    Mutant(
        name="let float32 hidden states overflow in float16",
        file="ops/products/backward.py",
        old="may_overflow=False",
        new="may_overflow=True",
        test="tests/ops/test_logprobs.py::TestAgainstFloat64",
    ),
    Mutant(
        name="write a precision back that was inherited",
        file="ops/products/gemm.py",
        old="cpu.enabled = before",
        new="cpu.enabled = before; cpu.matmul.fp32_precision = cpu.matmul.fp32_precision",
        test="tests/ops/test_logits.py::TestSurroundings",
    ),
    Mutant(
        name="run kernels that the GPU has no room for",
        file="ops/products/devices.py",
        old="if offered < SHARED_MEMORY[major]:",
        new="if False:",
        test="tests/ops/test_compiled_kernels.py",
    ),
    Mutant(
        name="forget the candidates in the chunks of top-k",
        file="ops/logprobs/topk.py",
        old="return 4 * columns + 24 * blocks + _BYTES_OF_A_CANDIDATE * BLOCK * min(k, blocks)",
        new="return 4 * columns",
        test="tests/ops/test_topk.py",
    ),
    Mutant(
        name="cut by the free memory under deterministic algorithms",
        file="ops/logprobs/workspace.py",
        old=" or torch.are_deterministic_algorithms_enabled()",
        new="",
        test="tests/ops/test_logprobs_arguments.py::test_deterministic_algorithms_cut_alike_in_every_run",
    ),
    Mutant(
        name="let the compiler know that there is one token",
        file="ops/products/weight_grad_triton.py",
        old='do_not_specialize=["tokens", "rows", "columns"]',
        new='do_not_specialize=["rows", "columns"]',
        test="tests/ops/test_compiled_kernels.py",
    ),
]
