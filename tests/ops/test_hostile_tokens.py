"""NaN logits, masked tokens, impossible labels and temperatures on the CPU; see `hostile_tokens.py`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.ops.hostile_tokens import CHECKS, Head, heads


@pytest.mark.parametrize("head", heads(), ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_a_hostile_token_touches(check: Callable[[Head], None], head: Head) -> None:
    check(head)
