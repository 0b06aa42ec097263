"""One fault."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutant:
    """A one-line fault."""

    name: str
    file: str
    old: str
    new: str
    test: str
