"""What goes wrong in one process is an error in all others, soon, and nothing is left."""

from __future__ import annotations

import pytest

from tests.transfer.processes import Outcome, Plan, run

SOON = 4.0
"""Seconds, on a busy machine. Time-outs are 20 s in plans that do not set another one."""
PATIENCE = 1.5


def ended(plan: Plan, *, within: float, gone: str = "") -> dict[str, str]:
    """Run a plan that must fail: the errors of all processes, but for the one that is gone."""
    errors = {}
    for name, outcome in run(plan).items():
        if name == gone:
            assert outcome is None
            continue
        assert isinstance(outcome, Outcome), name
        assert outcome.error is not None, name
        assert outcome.seconds < within, name
        assert (outcome.threads, outcome.files) == ([], 0), name
        errors[name] = outcome.error
    return errors


def refused(errors: dict[str, str]) -> bool:
    """Whether all of them are the package's."""
    return all(error.startswith("TransferError: ") for error in errors.values())


@pytest.mark.parametrize("stage", ["device", "host"])
def test_a_trainer_is_killed(stage: str) -> None:
    plan = Plan(workers=2, fault="trainer killed", tensors="even", stage=stage)
    errors = ended(plan, within=SOON, gone="trainer")
    assert refused(errors)
    assert {error.partition(":")[2][:20] for error in errors.values()} <= {
        " the trainer is gone",
        " a broadcast of weig",
    }


@pytest.mark.parametrize("at", [0, 11])
def test_a_trainer_is_stopped(at: int) -> None:
    plan = Plan(workers=2, fault="trainer stopped", tensors="even", timeout=PATIENCE, at=at)
    errors = ended(plan, within=2 * PATIENCE + SOON, gone="trainer")
    assert refused(errors)


@pytest.mark.parametrize("stage", ["device", "host"])
def test_a_worker_is_killed(stage: str) -> None:
    # In the stage "host" everything has been sent by then: the trainer knows only by the time-out.
    patience = PATIENCE if stage == "host" else 20.0
    plan = Plan(workers=2, fault="worker killed", tensors="even", stage=stage, timeout=patience)
    outcomes = run(plan)
    assert outcomes["worker 0"] is None
    trainer, other = outcomes["trainer"], outcomes["worker 1"]
    assert trainer is not None
    assert other is not None
    assert (trainer.error or "").startswith("TransferError: ")
    assert trainer.seconds < SOON + (PATIENCE if stage == "host" else 0)
    # A worker that has loaded everything and has reported is done.
    assert (other.error or "").startswith("TransferError: ") == (stage == "device")
    assert (trainer.threads, trainer.files, other.threads, other.files) == ([], 0, [], 0)


def test_a_worker_is_stopped() -> None:
    plan = Plan(workers=2, fault="worker stopped", tensors="even", timeout=PATIENCE)
    errors = ended(plan, within=2 * PATIENCE + SOON, gone="worker 0")
    assert refused(errors)


def test_a_worker_does_not_come() -> None:
    plan = Plan(workers=2, fault="worker killed before it came", tensors="even", timeout=PATIENCE)
    errors = ended(plan, within=2 * PATIENCE + SOON, gone="worker 0")
    assert refused(errors)
    assert "waited 1.5 s for the message 'hello/0'" in errors["trainer"]


def test_a_trainer_that_cannot_connect_keeps_nobody_waiting() -> None:
    errors = ended(Plan(workers=2, fault="trainer refuses", tensors="even"), within=SOON)
    assert refused(errors)
    assert "channel 'nccl' does not reach all workers: NCCL needs a GPU" in errors["trainer"]


def test_a_trainer_raises() -> None:
    errors = ended(Plan(workers=2, fault="trainer raises", tensors="even"), within=SOON)
    assert errors.pop("trainer") == "ZeroDivisionError: the model is gone"
    assert set(errors.values()) == {
        "TransferError: the trainer has stopped this push: ZeroDivisionError: the model is gone"
    }


@pytest.mark.parametrize("fault", ["worker raises", "finish raises"])
def test_one_worker_raises(fault: str) -> None:
    outcomes = run(Plan(workers=2, fault=fault, tensors="even", culprit=1))
    errors = {name: outcome.error or "" for name, outcome in outcomes.items() if outcome is not None}
    assert errors["worker 1"] == "ZeroDivisionError: the engine is full"
    assert errors["trainer"] == (
        "TransferError: the engine has failed: worker 1: ZeroDivisionError: the engine is full"
    )
    if fault == "worker raises":
        assert errors["worker 0"].startswith("TransferError: ")
        assert "worker 1: ZeroDivisionError" in errors["worker 0"]
    for outcome in outcomes.values():
        assert outcome is not None
        assert outcome.seconds < SOON
        assert (outcome.threads, outcome.files) == ([], 0)


@pytest.mark.parametrize("stage", ["device", "host"])
def test_a_bit_flips(stage: str) -> None:
    errors = ended(Plan(workers=2, fault="bit flips", tensors="even", stage=stage), within=SOON)
    assert refused(errors)
    assert any("the checksum of the tensors from t3 to t3 is wrong" in error for error in errors.values())
    assert "the checksum of the tensors from t3 to t3 is wrong" in errors["trainer"]


def test_a_staged_push_touches_all_models_or_none() -> None:
    outcomes = run(Plan(workers=2, fault="worker got other bytes", tensors="even", stage="host", culprit=1))
    other = outcomes["worker 0"]
    assert other is not None
    assert other.error == "TransferError: another worker has failed: worker 1: TransferError: bytes have changed" or (
        other.error or ""
    ).startswith("TransferError: the trainer has stopped this push")
    assert other.pushes == [{}]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("digest differs", f"SHA-256 of t0: expected {'0' * 64}, got "),
        ("digest is missing", "has not sent the SHA-256 of every tensor"),
    ],
)
def test_sha256_is_compared(fault: str, message: str) -> None:
    errors = ended(Plan(fault=fault, tensors="even", sha256=True), within=SOON)
    assert refused(errors)
    assert message in errors["worker 0"]
