"""The command `megatron-fp32`, which is also `python -m megatron_fp32`."""

from __future__ import annotations

from megatron_fp32.cli import main as commands


def main() -> None:
    """Run the command under the name `megatron-fp32`, however it was started: shell completion depends on the name."""
    commands(prog_name="megatron-fp32")


if __name__ == "__main__":
    main()
