"""`make rl-demo` with few steps."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.engine.server import PYTHON, ROOT

pytestmark = pytest.mark.engine

LINE = re.compile(r"step (\d+): samples of version (\d+), reward \S+, K3 (\S+), largest ratio (\S+) \| push (\d+): 56 ")


def test_every_step_is_pushed_and_both_sides_agree() -> None:
    """The bounds are those of bf16: log-probs of a small body with rounded activations differ by less than 2^-5."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "rl_demo.py"), "--engine-python", PYTHON, "--steps", "3"],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [LINE.match(line) for line in done.stdout.splitlines() if line.startswith("step")]
    assert [(int(s[1]), int(s[2]), int(s[5])) for s in steps if s] == [(1, 0, 1), (2, 1, 2), (3, 2, 3)]
    for step in steps:
        assert step is not None
        assert 0 <= float(step[3]) < 2**-11
        assert 0 < float(step[4]) < 1 + 2**-5
