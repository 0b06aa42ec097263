"""Faults that let a file take endless time or memory, or run code."""

from __future__ import annotations

from faults.mutant import Mutant

HOSTILE = "tests/checkpoint/formats/test_hostile_pickles.py"
HOSTILE_JSON = "tests/checkpoint/formats/test_hostile_json.py"
TORCH_FILE = "tests/checkpoint/formats/test_torch_file.py"

CONTENTS = [
    Mutant(
        name="set the state of a class",
        file="checkpoint/formats/pickles.py",
        old="if isinstance(instance, type) or not self.takes_state(instance):",
        new="if False:",
        test=f"{TORCH_FILE}::TestDamage {HOSTILE}::TestState",
    ),
    Mutant(
        name="hash keys of any size",
        file="checkpoint/formats/pickles.py",
        old="if kind is complex or not is_small(key, _KEY_PARTS):",
        new="if False:",
        test=f"{HOSTILE}::TestKeys",
    ),
    Mutant(
        name="give calls arguments of any size",
        file="checkpoint/formats/pickles.py",
        old="        if not is_right:\n",
        new="        if False:\n",
        test=f"{HOSTILE}::TestCalls",
    ),
    Mutant(
        name="take a common state of any depth",
        file="checkpoint/formats/common_state.py",
        old="        check_nesting(found, most_parts=_LEAST_PARTS + 16 * file.size)\n",
        new="",
        test=f"{HOSTILE}::TestNesting",
    ),
    Mutant(
        name="keep halves of surrogate pairs in a pickle",
        file="checkpoint/formats/pickles.py",
        old='self.append(str(self.read(*struct.unpack("<I", self.read(4))), "utf-8"))',
        new='self.append(str(self.read(*struct.unpack("<I", self.read(4))), "utf-8", "surrogatepass"))',
        test=f"{HOSTILE}::test_text_and_numbers_that_cannot_be_printed_are_refused",
    ),
    Mutant(
        name="share a list of chunks among any number of tensors",
        file="checkpoint/formats/torch_dist_metadata.py",
        old="count > size:",
        new="False:",
        test=f"{HOSTILE}::test_tensors_that_share_their_chunks_are_refused",
    ),
    Mutant(
        name="nest JSON at will",
        file="checkpoint/formats/json_file.py",
        old='    raise ValueError(f"nested too deeply: more than',
        new='    print(f"nested too deeply: more than',
        test=HOSTILE_JSON,
    ),
    Mutant(
        name="keep halves of surrogate pairs in JSON",
        file="checkpoint/formats/json_file.py",
        old="    if _SURROGATE.search(content):",
        new="    if False:",
        test=HOSTILE_JSON,
    ),
    Mutant(
        name="take infinite numbers from JSON",
        file="checkpoint/formats/json_file.py",
        old="    if not math.isfinite(value):",
        new="    if False:",
        test=HOSTILE_JSON,
    ),
    Mutant(
        name="make mappings for any number of experts",
        file="weights/hf_config/bounds.py",
        old="    if described > held + _SPARE_EXPERTS:",
        new="    if False:",
        test=f"{HOSTILE_JSON}::TestSizes",
    ),
    Mutant(
        name="believe any record of a part",
        file="checkpoint/jobs/staging.py",
        old='not isinstance(content, dict) or noted.get("xxh3_128") != _digest(content)',
        new="not isinstance(content, dict)",
        test=f"{HOSTILE_JSON}::test_a_damaged_record_is_refused_and_nothing_is_left",
    ),
]
