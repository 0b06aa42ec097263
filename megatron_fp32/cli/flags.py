"""Names of arguments in messages of the Python functions become flags of the command line. This is the only place.

A message of the package names an argument in one of two ways: `NAME must ...` at its beginning, or `NAME=VALUE`, as a
caller writes it in Python. An option of a command has the name of the argument that it is passed on as.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import click


def all_options(group: click.Group) -> dict[str, click.Option]:
    """The options of all commands by the name of the argument. One name has the same flag in all of them."""
    params = [param for command in group.commands.values() for param in command.params]
    return {param.name: param for param in params if isinstance(param, click.Option) and param.name}


def with_flags(message: str, options: Mapping[str, click.Option]) -> str:
    """The message with flags in the place of arguments.

    `vision='carry'` becomes `--vision carry`, `text_only=True` becomes `--text-only`, and `workers must be` becomes
    `--workers must be`. Arguments that are not among the options stay as they are.
    """
    name = "|".join(map(re.escape, options))
    message = re.sub(rf"(\A|: )({name})(?= must\b)", lambda found: f"{found[1]}{_flag(options[found[2]])}", message)
    return re.sub(
        # Not within a path.
        rf"(?<![\w.=/-])({name})=('[^']*'|\"[^\"]*\"|\w+)",
        lambda found: _passed(options[found[1]], found[2]),
        message,
    )


def _passed(option: click.Option, value: str) -> str:
    # A flag is passed alone, for True.
    return _flag(option) if option.is_flag else f"{_flag(option)} {value.strip(chr(39) + chr(34))}"


def _flag(option: click.Option) -> str:
    return option.opts[0]
