"""Break the package in one named way at a time, and check that a named test notices.

    python tests/mutants.py [--workers N] [NAME ...]

Works on copies of the tree, one for each of N faults at a time. Exits with 1 when a fault goes unnoticed, does not
apply, or its test fails without it.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent


def main(names: list[str], workers: int) -> int:
    """Run the mutants, or those named."""
    unknown = set(names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        print(f"no such mutants: {sorted(unknown)}", file=sys.stderr)
        return 2
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for i in range(workers):
            copies.put(copy_tree(Path(directory) / str(i)))
        tests = sorted({test for mutant in chosen for test in mutant.test.split()})
        print(f"{len(tests)} tests without a fault ...", flush=True)
        whole = copies.get()
        if not passes(whole, tests, ["-n", str(workers)]):
            print("they fail without a fault; nothing can be said", file=sys.stderr)
            return 1
        copies.put(whole)

        def noticed_in_a_copy(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                return noticed(copy, mutant)
            finally:
                copies.put(copy)

        pool = ThreadPoolExecutor(workers)
        try:
            red = list(pool.map(noticed_in_a_copy, chosen))
        finally:
            pool.shutdown(cancel_futures=True)
    survivors = [mutant.name for mutant, seen in zip(chosen, red, strict=True) if not seen]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} faults noticed")
    for name in survivors:
        print(f"NOT NOTICED: {name}")
    return 1 if survivors else 0


def copy_tree(place: Path) -> Path:
    """A copy of the tree without what is not tracked."""
    return shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(".*", "*.egg-info", "demo-out", "build"))


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
        red = not passes(copy, mutant.test.split(), ["-x", "-p", "no:xdist"])
    finally:
        path.write_text(text)
    print(f"{'noticed' if red else 'NOT NOTICED':12} {time.monotonic() - start:5.1f} s  {mutant.name}", flush=True)
    return red


def passes(copy: Path, tests: list[str], options: list[str]) -> bool:
    """Whether the tests pass in the copy; anything but 'passed' and 'some failed' is an error."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, *tests]
    # What a test starts must find the copy, not the tree whose paths we were given.
    path = os.pathsep.join([str(copy), *filter(None, [os.environ.get("PYTHONPATH")])])
    run = subprocess.run(
        command,
        cwd=copy,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode not in (0, 1):
        print(run.stdout[-2000:], run.stderr[-2000:], file=sys.stderr)
        raise SystemExit(f"pytest ended with {run.returncode}")
    return run.returncode == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--workers", type=int, default=1, help="faults at a time")
    arguments = parser.parse_args()
    sys.exit(main(arguments.names, max(1, arguments.workers)))
