"""Faults of the command line."""

from __future__ import annotations

from faults.mutant import Mutant

CLI = "tests/cli"

COMMANDS = [
    Mutant(
        name="import torch for --help",
        file="cli/export.py",
        old="from megatron_fp32.weights.choices import ExportDtype, Fp8Format\n",
        new="from megatron_fp32.weights.choices import ExportDtype, Fp8Format\nimport torch\n",
        test=f"{CLI}/test_start.py",
    ),
    Mutant(
        name="fetch from the Hub although there is a directory",
        file="cli/options.py",
        old="        if not os.path.lexists(value) and not _looks_local(str(value)):\n",
        new="        if True:\n",
        test=f"{CLI}/test_hub.py::test_what_exists_here_wins",
    ),
    Mutant(
        name="fetch the copies in other folders of a repository",
        file="cli/hub.py",
        old='NOT_FETCHED = ("*/*",)',
        new="NOT_FETCHED = ()",
        test=f"{CLI}/test_hub.py::test_the_files_that_are_fetched",
    ),
    Mutant(
        name="fetch another revision",
        file="cli/hub.py",
        old="            revision=source.revision,\n",
        new="",
        test=f"{CLI}/test_hub.py::test_an_import_and_what_it_says",
    ),
    Mutant(
        name="a line in the log for every tensor",
        file="cli/progress.py",
        old="if now - self._last >= self._interval:",
        new="if now >= self._last:",
        test=f"{CLI}/test_progress.py",
    ),
    Mutant(
        name="take what an earlier run has done for speed",
        file="cli/progress.py",
        old="self._slowest_before: int | None = None",
        new="self._slowest_before: int | None = 0",
        test=f"{CLI}/test_progress.py",
    ),
    Mutant(
        name="the smallest difference first",
        file="cli/verify_text.py",
        old="not differs_in_non_finite(difference), -size",
        new="not differs_in_non_finite(difference), size",
        test=f"{CLI}/test_verify_text.py::test_the_worst_comes_first",
    ),
    Mutant(
        name="summarize only the differences that are listed",
        file="cli/verify_text.py",
        old="for line in _by_layer(ordered, width):",
        new="for line in _by_layer(shown, width):",
        test=f"{CLI}/test_verify_text.py::test_the_summary_counts_what_is_not_listed",
    ),
    Mutant(
        name="wrap nothing",
        file="cli/verify_text.py",
        old="    width = out.width if sys.stdout.isatty() else _WIDTH\n",
        new="    width = out.width if sys.stdout.isatty() else 1000\n",
        test=f"{CLI}/test_verify_text.py::test_80_columns_are_enough",
    ),
    Mutant(
        name="draw the last expert instead of the worst",
        file="cli/plots.py",
        old="sizes[cell] = max(size, sizes.get(cell, 0.0))",
        new="sizes[cell] = size",
        test=f"{CLI}/test_plots.py::TestDifferences",
    ),
    Mutant(
        name="one dtype for experts of several",
        file="cli/plots.py",
        old="min(of_it) if len(of_it) == 1 else SEVERAL",
        new="min(of_it)",
        test=f"{CLI}/test_plots.py::TestDtypes",
    ),
    Mutant(
        name="find out that a plot cannot be written when everything is compared",
        file="cli/options.py",
        old="    plots.check_file(file)\n",
        new="",
        test=f"{CLI}/test_plots.py::TestRefused",
    ),
    Mutant(
        name="take a part of a path for an argument",
        file="cli/flags.py",
        old='rf"(?<![\\w.=/-])(',
        new='rf"(?<![\\w.=])(',
        test=f"{CLI}/test_flags.py::test_what_becomes_a_flag",
    ),
    Mutant(
        name="leave the names of arguments in messages of the commands",
        file="cli/terminal.py",
        old="{in_flags(str(error))}",
        new="{error}",
        test=f"{CLI}/test_flags.py::TestBothWays",
    ),
    Mutant(
        name="call weights behind a dead link missing",
        file="checkpoint/identify.py",
        old="        refuse_irregular_file(directory / name)\n",
        new="        pass\n",
        test="tests/messages/test_inputs.py::TestWhatIsInTheDirectory",
    ),
    Mutant(
        name="call the scales of a quantized source unexpected",
        file="checkpoint/plan.py",
        old="    _refuse_quantized(converted)\n",
        new="",
        test="tests/messages/test_inputs.py::TestWhatIsInTheDirectory::test_a_source_that_is_quantized",
    ),
]
