"""Names of arguments in messages of the Python functions become flags of the command line. This is the only place.

A message of the package names an argument in one of two ways: `NAME must ...` at its beginning, or `NAME=VALUE`, as a
caller writes it in Python. An option of a command has the name of the argument that it is passed on as.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import click


def with_flags(message: str, options: Mapping[str, click.Option]) -> str:
    """The message with flags in the place of arguments.

    `vision='carry'` becomes `--vision carry`, `text_only=True` becomes `--text-only`, and `workers must be` becomes
    `--workers must be`. Arguments that are not among the options stay as they are.
    """
    if not options:
        return message
    name = "|".join(map(re.escape, options))
    message = re.sub(rf"\A({name})(?= must\b)", lambda found: _flag(options[found[1]]), message)
    return re.sub(
        rf"(?<![\w.=])({name})=('[^']*'|\"[^\"]*\"|[\w./*-]*\w)",
        lambda found: _passed(options[found[1]], found[2]),
        message,
    )


def _passed(option: click.Option, value: str) -> str:
    if option.is_flag:
        # There is no flag for False: it is what holds without the flag.
        return _flag(option) if value == "True" else f"no {_flag(option)}"
    return f"{_flag(option)} {value.strip(chr(39) + chr(34))}"


def _flag(option: click.Option) -> str:
    return max(option.opts, key=len)
