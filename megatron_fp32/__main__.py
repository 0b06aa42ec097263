"""The command `megatron-fp32`, also `python -m megatron_fp32`."""

from __future__ import annotations

from megatron_fp32.cli import main as commands


def main() -> None:
    """Run the command. Its name is the same whichever way it was started; shell completion depends on it."""
    commands(prog_name="megatron-fp32")


if __name__ == "__main__":
    main()
