"""Cases that need Triton's interpreter, which must be chosen before a kernel is imported: in a process of their own.

A module of such cases has a dict `CASES`, from a name to a function without arguments. All of a module's cases run in
one process, because it takes seconds to start; each is a test of its own in the process that started it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def names_of(module: str) -> list[str]:
    """The names of a module's cases; none where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return []
    return list(importlib.import_module(module).CASES)


def run_in_interpreter(module: str) -> dict[str, str]:
    """Run all cases of a module: by its name the traceback of each, and an empty text for those that passed."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.interpreter", module],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    outcomes: dict[str, str] = json.loads(run.stdout)
    return outcomes


def main(module: str) -> None:
    """Run the cases here, and print their outcomes as JSON."""
    outcomes = {}
    for name, case in importlib.import_module(module).CASES.items():
        torch.manual_seed(0)
        try:
            case()
        except Exception:
            outcomes[name] = traceback.format_exc()
        else:
            outcomes[name] = ""
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(sys.argv[1])
