"""Which tests run in one worker."""

from __future__ import annotations

import pytest

from tests.groups import HEAVY, RANKS, group_of, place_of


def test_every_test_on_ranks_is_in_their_group(request: pytest.FixtureRequest) -> None:
    """Of the tests that this run has collected."""
    on_ranks = [item for item in request.session.items if RANKS in getattr(item, "fixturenames", ())]
    assert [item.nodeid for item in on_ranks if group_of(item.nodeid) != RANKS] == []


def test_a_file_is_a_group_and_a_heavy_test_another() -> None:
    page = f"{HEAVY[0]}[README.md]"
    resumed = "tests/distributed/test_resume.py::test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit[DP4]"
    other = "tests/test_docs.py::test_index_lists_every_page"
    assert [group_of(test) for test in (resumed, page, other)] == [RANKS, page, "tests/test_docs.py"]
    assert sorted((other, page, resumed), key=place_of) == [resumed, page, other]


def test_heavy_tests_exist(request: pytest.FixtureRequest) -> None:
    (docs,) = {test.split("::")[0] for test in HEAVY}
    text = (request.config.rootpath / docs).read_text()
    assert all(f"def {test.split('::')[1]}(" in text for test in HEAVY)
