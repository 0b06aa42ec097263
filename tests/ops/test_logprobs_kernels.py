"""The Triton kernels of the head, in Triton's interpreter; on the GPU they are tested in tests/gpu."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["interpreted_kernels.py", "interpreted_hostile_tokens.py"])
def test_kernels_compute_what_their_definitions_do(script: str) -> None:
    """In a process of its own: the interpreter must be chosen before a kernel is imported."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/ops" / script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "done\n", run.stderr
