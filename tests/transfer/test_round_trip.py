"""Pushes between real processes over gloo: what arrives, and in how much memory."""

from __future__ import annotations

import pytest

from tests.transfer.processes import Outcome, Plan, expected, run


def whole(plan: Plan) -> dict[str, Outcome]:
    """Run a plan that must succeed, and leave nothing."""
    found = {}
    for name, outcome in run(plan).items():
        assert outcome is not None, name
        assert (outcome.error, outcome.threads, outcome.files) == (None, [], 0), name
        found[name] = outcome
    return found


@pytest.mark.parametrize(
    "plan",
    [
        Plan(pushes=2, sha256=True),
        Plan(workers=3, pushes=2),
        Plan(workers=2, stage="host", pushes=2, sha256=True),
        Plan(stage="host", bucket_bytes=1),
        Plan(bucket_bytes=1 << 20),
        Plan(tensors="odd_names", sha256=True),
        Plan(tensors="nothing", sha256=True, pushes=2),
    ],
    ids=str,
)
def test_every_bit_arrives_on_every_worker(plan: Plan) -> None:
    outcomes = whole(plan)
    for rank in range(plan.workers):
        assert outcomes[f"worker {rank}"].pushes == [expected(plan)] * plan.pushes
        assert [list(got) for got in outcomes[f"worker {rank}"].pushes] == [list(expected(plan))] * plan.pushes
    for reports in outcomes["trainer"].reports:
        assert [report["rank"] for report in reports] == list(range(plan.workers))
        assert {report["version"] for report in reports} == {1}
        assert {report["tensors"] for report in reports} == {len(expected(plan))}


@pytest.mark.parametrize("keep", [False, True])
def test_each_side_holds_two_buckets(keep: bool) -> None:
    outcomes = whole(Plan(workers=2, tensors="even", pushes=2, keep=keep))
    assert {name: outcome.most_live for name, outcome in outcomes.items()} == {
        "trainer": 2,
        "worker 0": 2,
        "worker 1": 2,
    }
