"""Build the sdist and, from it, the wheel; check what they hold; run the wheel where nothing heavy is installed.

    python .ci/dist.py LOCK OUT    LOCK pins click and rich; OUT gets the two files

The sdist must hold every tracked file, and the wheel must hold the package. In an environment with only the wheel,
click and rich, without torch and megatron-core, `megatron-fp32 --help` must work for every command, and the package
must list its public names.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# setuptools writes these itself.
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|megatron_fp32\.egg-info/.*")


def main(lock: Path, out: Path) -> int:
    """The exit status: 0, or 1 when something is missing or does not run."""
    tracked = command("git", "ls-files", cwd=ROOT).splitlines()
    tracked = [name for name in tracked if (ROOT / name).exists()]  # a deletion may not be committed yet
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for name in tracked:
            (work / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, work / "tree" / name)
        sdist = build("sdist", work / "tree", out)
        with tarfile.open(sdist) as archive:
            archive.extractall(work / "sdist", filter="data")
        (unpacked,) = (work / "sdist").iterdir()
        held = files_below(unpacked)
        wheel = build("wheel", unpacked, out)
        problems = [
            *differences("the sdist", held, tracked),
            *differences("the wheel", zipfile.ZipFile(wheel).namelist(), of_package(tracked)),
            *wheel_problems(wheel, lock, work / "venv"),
        ]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(problems)} problems; {sdist}, {wheel}")
    return bool(problems)


def build(kind: str, tree: Path, out: Path) -> Path:
    """The sdist or wheel of a tree, by the build backend that pyproject.toml names."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"import sys, setuptools.build_meta as backend; print(backend.build_{kind}(sys.argv[1]))"
    return out / command(sys.executable, "-c", code, str(out.resolve()), cwd=tree).splitlines()[-1]


def files_below(tree: Path) -> list[str]:
    """Names of all files, relative to the tree."""
    return [str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()]


def of_package(tracked: Iterable[str]) -> list[str]:
    """What a wheel holds: the modules and the marker of a typed package."""
    return [name for name in tracked if name.startswith("megatron_fp32/")]


def differences(archive: str, held: Iterable[str], expected: Iterable[str]) -> list[str]:
    """One sentence for each file that is missing, or that nobody tracks."""
    present = {name for name in held if not GENERATED.fullmatch(name) and ".dist-info/" not in name}
    missing = [f"{archive} lacks {name}" for name in sorted(set(expected) - present)]
    return missing + [f"{archive} holds {name}, which is not tracked" for name in sorted(present - set(expected))]


def wheel_problems(wheel: Path, lock: Path, venv: Path) -> list[str]:
    """What does not run in an environment that has only the wheel, click and rich."""
    version = wheel.name.split("-")[1]
    command(sys.executable, "-m", "venv", str(venv))
    python, tool = venv / "bin" / "python", venv / "bin" / "megatron-fp32"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pins = [line for line in lock.read_text().splitlines() if line.startswith(("click==", "rich=="))]
    command(*pip, *pins)
    command(*pip, "--no-deps", str(wheel))
    names = "import megatron_fp32; print(megatron_fp32.__version__, len(dir(megatron_fp32)), *megatron_fp32.__all__)"
    problems = [f"the environment has {name}" for name in ("torch", "numpy", "megatron") if installed(python, name)]
    named = commands(tool)
    if not named:
        problems.append("megatron-fp32 --help lists no commands")
    for line, expected in (
        ((tool, "--version"), version),
        ((python, "-m", "megatron_fp32", "--version"), version),
        ((python, "-c", names), version),
        ((python, "-c", names), "apply_fp32"),
        *(((tool, *name, "--help"), "Usage: ") for name in ([], *([name] for name in named))),
    ):
        ran = subprocess.run([str(word) for word in line], capture_output=True, text=True, env=clean(), cwd=venv)
        if ran.returncode or expected not in ran.stdout:
            last = (ran.stderr.strip() or ran.stdout.strip()).splitlines()[-1:]
            problems.append(f"{Path(line[0]).name} {' '.join(map(str, line[1:]))}: {''.join(last) or 'no output'}")
    return problems


def commands(tool: Path) -> list[str]:
    """The commands that --help lists."""
    shown = subprocess.run([str(tool), "--help"], capture_output=True, text=True, env=clean(), cwd=tool.parent).stdout
    return re.findall(r"^  (\w[\w-]*)  ", shown.partition("Commands:")[2], re.MULTILINE)


def installed(python: Path, name: str) -> bool:
    """Whether that Python finds a package."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    return subprocess.run([str(python), "-c", code], env=clean()).returncode == 0


def clean() -> dict[str, str]:
    """The environment without paths to other packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def command(*line: str, cwd: Path | None = None) -> str:
    """What a command prints; when it fails, the script ends with what the command said."""
    ran = subprocess.run(line, cwd=cwd, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{' '.join(line)} failed:\n{ran.stdout}{ran.stderr}")
    return ran.stdout


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
