"""Break the package in one named way at a time, and check that a named test notices.

    python tests/mutants.py [NAME ...]

Works on a copy of the tree. Exits with 1 when a fault goes unnoticed, does not apply, or its test fails without it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent


def main(names: list[str]) -> int:
    """Run the mutants, or those named."""
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"no such mutants: {sorted(unknown)}", file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        copy = Path(directory) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "*.egg-info", "demo-out", "build"))
        tests = sorted({test for mutant in chosen for test in mutant.test.split()})
        print(f"{len(tests)} tests without a fault ...", flush=True)
        if not passes(copy, tests):
            print("they fail without a fault; nothing can be said", file=sys.stderr)
            return 1
        survivors = [mutant.name for mutant in chosen if not noticed(copy, mutant)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults noticed")
    for name in survivors:
        print(f"NOT NOTICED: {name}")
    return 1 if survivors else 0


def noticed(copy: Path, mutant: Mutant) -> bool:
    """Whether the mutant's test fails with the fault in place."""
    path = copy / "megatron_fp32" / mutant.file
    text = path.read_text()
    if problems := mutant.problems(copy):
        print(f"does not apply: {mutant.name}: {'; '.join(problems)}", file=sys.stderr)
        return False
    start = time.monotonic()
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        red = not passes(copy, mutant.test.split())
    finally:
        path.write_text(text)
    print(f"{'noticed' if red else 'NOT NOTICED':12} {time.monotonic() - start:5.1f} s  {mutant.name}", flush=True)
    return red


def passes(copy: Path, tests: list[str]) -> bool:
    """Whether the tests pass in the copy; anything but 'passed' and 'some failed' is an error."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(
        command,
        cwd=copy,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode not in (0, 1):
        print(run.stdout[-2000:], run.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"pytest ended with {run.returncode}")
    return run.returncode == 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
