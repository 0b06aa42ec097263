"""The errors of the package, and helpers for their messages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint cannot be read or converted. The message names the file and the tensors."""


class TransferError(RuntimeError):
    """Weights did not reach an inference engine. The engine has no version until a later push succeeds."""


def summary(error: BaseException, limit: int = 200) -> str:
    """The class of an error and its message, cut after `limit` characters: a message may quote a whole damaged file."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def listing(names: Sequence[str], limit: int = 8) -> str:
    """The first `limit` names, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"


@contextlib.contextmanager
def checkpoint_named(directory: Path) -> Iterator[None]:
    """Put the directory in front of the message of a CheckpointError or a ValueError from the block."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{directory}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error
