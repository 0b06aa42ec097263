"""Faults of the optimizer repairs, and of what is refused instead."""

from __future__ import annotations

from faults.mutant import Mutant

CHECK = "tests/test_check.py::TestCheck"
STATES = "tests/distributed/test_optimizer_states.py"
NAMES = f"{STATES}::test_every_state_has_the_values_of_its_own_name"
EXCHANGE = f"{STATES}::test_between_16_bit_and_native_fp32"

OPTIMIZERS = [
    Mutant(
        name="count the padding between buckets",
        file="optimizer/distributed.py",
        old="buffer.param_index_map = _places_without_padding(buffer)",
        new="pass",
        test=f"{NAMES}[buckets-DP2-to-DP2]",
    ),
    Mutant(
        name="leave a part of padding empty",
        file="optimizer/distributed.py",
        old="bucket.append(_padding_of_no_length(like))",
        new="pass",
        test=f"{NAMES}[dp_reshardable-DP4-to-DP2]",
    ),
    Mutant(
        name="leave other ranks' parts as the model has them",
        file="optimizer/distributed.py",
        old="if buffer.param_dtype == torch.float32 and",
        new="if False and",
        test=f"{EXCHANGE}[True-fully-buckets-DP4]",
    ),
    Mutant(
        name="leave native-fp32 parameters as the model has them",
        file="optimizer/float16.py",
        old="native[number].data.copy_(master)",
        new="pass",
        test=f"{EXCHANGE}[True-float16]",
    ),
    Mutant(
        name="ask for main parameters that an older file does not have",
        file="optimizer/float16.py",
        old="setattr(master, _MAY_BE_ABSENT, True)",
        new="pass",
        test=f"{STATES}::test_a_file_of_before_native_masters_loads",
    ),
    Mutant(
        name="accept gradients of two dtypes in one call",
        file="optimizer/checks.py",
        old="if len(gradients) > 1:",
        new="if False:",
        test=CHECK,
    ),
    Mutant(
        name="accept an optimizer on the CPU",
        file="check.py",
        old="yield from offload_problems(inner)",
        new="pass",
        test=CHECK,
    ),
]
