"""Which tests run in one worker of pytest-xdist, one after another, and which begin first.

Tests of one file are a group, because they share what the file makes once. There are two exceptions:

- Tests that use the fixture `ranks` are one group, so that each pool of ranks starts once.
- A test with the marker `heavy` is a group of its own. It takes 10 seconds or more and shares nothing.

The ranks begin first, then the heavy tests, so that none of them begins when the other workers are about to end.
"""

from __future__ import annotations

import pytest

RANKS = "ranks"


def group_of(item: pytest.Item) -> str:
    """The name of a test's group."""
    if RANKS in getattr(item, "fixturenames", ()):
        return RANKS
    if item.get_closest_marker("heavy"):
        # xdist finds the name behind the last `@`, unless a bracket closes after it.
        return item.nodeid.translate(str.maketrans("@[]", "---"))
    return item.location[0]


def group(items: list[pytest.Item]) -> None:
    """Sort the tests by when they begin, and give them their groups as markers of xdist."""
    items.sort(key=lambda item: (group_of(item) != RANKS, item.get_closest_marker("heavy") is None))
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
