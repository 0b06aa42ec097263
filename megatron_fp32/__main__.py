"""The command `megatron-fp32`, also `python -m megatron_fp32`."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command. An interruption while torch is imported, which takes seconds, is no traceback either."""
    try:
        from megatron_fp32.cli import main as command
    except KeyboardInterrupt:
        print("megatron-fp32: interrupted before anything was done", file=sys.stderr)
        sys.exit(130)
    command(prog_name="megatron-fp32")


if __name__ == "__main__":
    main()
