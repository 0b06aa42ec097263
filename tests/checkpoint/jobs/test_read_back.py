"""Reading back what was written, behind the thread that writes."""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import pytest

from megatron_fp32.checkpoint.jobs import read_back
from megatron_fp32.checkpoint.jobs.read_back import ReadBack

BATCH = 100


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(read_back, "_BATCH", BATCH)
    path = tmp_path / "file"
    path.touch()
    return path


def test_every_check_is_made_once_in_order_and_told_by_the_one_who_writes(file: Path) -> None:
    made: list[int] = []
    told: list[tuple[int, threading.Thread]] = []
    with ReadBack(file, lambda nbytes: told.append((nbytes, threading.current_thread()))) as reader:
        for number in range(7):
            reader.add(40, functools.partial(made.append, number))
        reader.finish()
        assert made == list(range(7))
    assert [nbytes for nbytes, _ in told] == [120, 120, 40]
    assert {thread for _, thread in told} == {threading.current_thread()}


def test_a_last_batch_that_is_full_is_the_last(file: Path) -> None:
    told: list[int] = []
    with ReadBack(file, told.append) as reader:
        for _ in range(2):
            reader.add(BATCH, lambda: None)
        reader.finish()
    assert told == [BATCH, BATCH]


def test_the_file_goes_to_the_disk_before_it_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    monkeypatch.setattr(read_back, "to_disk", events.append)
    with ReadBack(file, lambda nbytes: None) as reader:
        for number in range(3):
            reader.add(BATCH, functools.partial(events.append, number))
        reader.finish()
    assert events[:6] == [file, 0, file, 1, file, 2]


def test_the_writer_waits_when_it_is_two_batches_ahead(file: Path) -> None:
    slow, ahead = threading.Event(), threading.Event()

    def write() -> None:
        with ReadBack(file, lambda nbytes: None) as reader:
            reader.add(BATCH, lambda: bool(slow.wait(60)))
            ahead.set()
            reader.add(BATCH, lambda: None)
            written.set()
            reader.finish()

    written = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    assert ahead.wait(60)
    assert not written.wait(0.2)
    slow.set()
    assert written.wait(60)
    writer.join()


@pytest.mark.parametrize("more", [0, 5])
def test_what_a_check_raises_reaches_the_writer_and_nothing_runs_on(file: Path, more: int) -> None:
    made: list[int] = []

    def damaged() -> None:
        raise ValueError("damaged")

    def write(reader: ReadBack) -> None:
        reader.add(BATCH, damaged)
        for number in range(more):
            reader.add(BATCH, functools.partial(made.append, number))
        reader.finish()

    before = threading.active_count()
    with pytest.raises(ValueError, match="damaged"), ReadBack(file, lambda nbytes: None) as reader:
        write(reader)
    assert made in ([], [0])
    assert threading.active_count() == before
