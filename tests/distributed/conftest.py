from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_fp32.testing.cpu import single_process
from tests.support import rank_setup


@pytest.fixture
def one_rank() -> Iterator[None]:
    """What a rank of the pools enters, in this process."""
    with rank_setup(), single_process():
        yield
