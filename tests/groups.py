"""Which tests run in one worker of pytest-xdist, one after another, and which begin first.

The tests of one file are a group, because they share what the file makes once. There are two exceptions:

- All files that use the fixture `ranks` are one group, so that each pool of ranks starts in one worker only.
- Each test of `HEAVY` is a group of its own.

The ranks begin first, then the heavy tests, so that none of them begins when the other workers are about to end.
xdist's own `--dist loadgroup` does nothing with pytest 9.2: xdist 3.8 renames tests in a way that pytest has lost.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent

RANKS = "ranks"

HEAVY = ("tests/test_docs.py::test_every_block_of_a_page_runs_as_it_stands",)
"""Tests with cases of 10 to 60 seconds that share nothing."""


def group_of(test: str) -> str:
    """The group of a test, which is given by its id."""
    file = test.split("::")[0]
    if uses_ranks(file):
        return RANKS
    return test if test.startswith(HEAVY) else file


def place_of(test: str) -> int:
    """Groups with smaller numbers begin first."""
    group = group_of(test)
    return 0 if group == RANKS else 1 if group == test else 2


@functools.cache
def uses_ranks(file: str) -> bool:
    """Whether a function of a file has an argument `ranks`."""
    return re.search(r"[(,]\s*ranks: ", (ROOT / file).read_text()) is not None
