"""Fixtures of the streaming tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.streaming.sglang_server import Server, serving


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[tuple[str, Server]]:
    with serving(tmp_path / "server") as found:
        yield found
