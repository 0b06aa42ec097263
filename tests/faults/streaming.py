"""Faults of mappings as data, of live tensors and of streaming."""

from __future__ import annotations

from faults.mutant import Mutant

MAPPING = "tests/weights/test_mapping.py"
LIVE = "tests/models/test_live.py"
STREAMER = "tests/streaming/test_streamer.py"

STREAMING = [
    Mutant(
        name="give a shard the first rows of a run",
        file="weights/mapping.py",
        old="hf_start = run.hf_start + first - run.megatron_start",
        new="hf_start = run.hf_start",
        test=f"{MAPPING}::TestShards",
    ),
    Mutant(
        name="leave the gates of a group behind its keys",
        file="weights/mapping.py",
        old="for gate in (0, 1) for head in members]",
        new="for head in members for gate in (0, 1)]",
        test=f"{MAPPING}::test_gated_qkv_puts_each_row_where_megatron_reads_it",
    ),
    Mutant(
        name="accept runs that leave rows out",
        file="weights/mapping.py",
        old="    if end != rows:\n",
        new="    if False:\n",
        test=f"{MAPPING}::TestRefuses",
    ),
    Mutant(
        name="read a model of which ranks are missing",
        file="models/live.py",
        old="            if held != expected:\n",
        new="            if False:\n",
        test=f"{LIVE}::TestRanks::test_a_group_that_lacks_ranks_is_refused",
    ),
    Mutant(
        name="send the values before the last step",
        file="models/live.py",
        old="chunk.start_param_sync(force_sync=True)",
        new="pass",
        test=f"{STREAMER}::test_parameters_that_a_step_left_on_other_ranks_are_gathered_first",
    ),
    Mutant(
        name="send up as gate",
        file="streaming/units.py",
        old="named = [(part.name, tensor[part.start : part.stop]) for part in parts]",
        new="named = [(part.name, tensor[: part.stop - part.start]) for part in parts]",
        test=f"{STREAMER}::test_float8_is_what_export_quantizes",
    ),
    Mutant(
        name="send a model that was rounded",
        file="streaming/streamer.py",
        old="if found.rounded and not self._allow_rounded:",
        new="if False:",
        test=f"{STREAMER}::TestOneProcess::test_a_model_that_was_rounded_is_refused",
    ),
]
