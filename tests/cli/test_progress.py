"""Lines for logs, by a clock that the test sets."""

from __future__ import annotations

import pytest

from megatron_fp32.cli.progress import LogLines, duration, progress, size

GB = 10**9


class Log:
    """Lines that were written, and the time."""

    def __init__(self) -> None:
        self.now = 100.0
        self.lines: list[str] = []
        self.tell = LogLines(self.lines.append, clock=lambda: self.now, interval=30.0).tell


def test_a_job_that_ends_sooner_has_no_line() -> None:
    log = Log()
    for second in range(30):
        log.now = 100 + second
        log.tell("write", GB, 30 * GB)
    assert log.lines == []


def test_a_line_every_half_minute() -> None:
    log = Log()
    for second in range(1, 101):
        log.now = 100 + second
        log.tell("write", GB, 200 * GB)
        if second > 10:
            log.tell("verify", GB, 200 * GB)
    assert log.lines == [
        "30 s: write 30.0 GB of 200.0 GB (15%), verify 19.0 GB of 200.0 GB (9%)",
        "60 s: write 60.0 GB of 200.0 GB (30%), verify 49.0 GB of 200.0 GB (24%), 1.0 GB/s, about 3 min left",
        "90 s: write 90.0 GB of 200.0 GB (45%), verify 79.0 GB of 200.0 GB (39%), 1.0 GB/s, about 2 min left",
    ]


def test_what_an_earlier_run_did_is_not_taken_for_speed() -> None:
    log = Log()
    log.tell("write", 90 * GB, 100 * GB)
    log.now += 30
    log.tell("write", 3 * GB, 100 * GB)
    log.now += 30
    log.tell("write", 3 * GB, 100 * GB)
    assert log.lines == [
        "30 s: write 93.0 GB of 100.0 GB (93%)",
        "60 s: write 96.0 GB of 100.0 GB (96%), 100.0 MB/s, about 40 s left",
    ]


def test_nothing_new_for_a_long_time() -> None:
    log = Log()
    log.tell("compare", 1, 0)
    for _ in range(2):
        log.now += 3600
        log.tell("compare", 0, 0)
    assert log.lines == [
        "60 min: compare 1 bytes of 0 bytes (100%)",
        "2.0 h: compare 1 bytes of 0 bytes (100%), 0 bytes/s",
    ]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 kB"),
        (2 * 10**6, "2.0 MB"),
        (5 * 10**9, "5.0 GB"),
        (2e12, "2.0 TB"),
    ],
)
def test_sizes(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(45, "45 s"), (119, "119 s"), (720, "12 min"), (9000, "2.5 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_short_job_says_nothing_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as tell:
        tell("write", 5, 5)
    assert capsys.readouterr() == ("", "")
