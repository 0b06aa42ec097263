"""One fault."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A one-line fault."""

    name: str
    file: str
    """Below `megatron_fp32/`."""
    old: str
    new: str
    test: str
    """What must notice: ids of pytest, with a space between two."""

    def problems(self, root: Path) -> list[str]:
        """Why the fault or its tests are not those of the tree at `root`; nothing is run."""
        path = root / "megatron_fp32" / self.file
        if not path.is_file():
            return [f"there is no {path}"]
        text = path.read_text()
        if text.count(self.old) != 1:
            return [f"{path} holds the text in {text.count(self.old)} places, expected one: {self.old!r}"]
        found = [f"there is no test {test}" for test in self.test.split() if not _exists(root, test)]
        try:
            changed = ast.parse(text.replace(self.old, self.new))
        except SyntaxError as error:
            # Every test would fail then, and say nothing of the fault.
            return [*found, f"{path} is no Python with the fault: {error}"]
        same = ast.dump(changed) == ast.dump(ast.parse(text))
        return [*found, *([f"{path} is the same program with the fault"] if same else [])]


def _exists(root: Path, test: str) -> bool:
    """Whether a file has the classes and functions that an id names; parameters in brackets are believed."""
    file, *names = test.split("[")[0].split("::")
    if not names and (root / file).is_dir():
        return True
    if not (root / file).is_file():
        return False
    place: ast.AST | None = ast.parse((root / file).read_text())
    for name in names:
        inner = getattr(place, "body", [])
        place = next((node for node in inner if getattr(node, "name", None) == name), None)
    return place is not None
