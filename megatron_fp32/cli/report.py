"""Lines that the reports of several conversions have."""

from __future__ import annotations

from megatron_fp32.cli.terminal import console
from megatron_fp32.errors import listing


def print_quantization_entries(entries: tuple[str, ...], done: str = "left out") -> None:
    """Say which entries and files of the source describe a quantization that its weights do not have."""
    if entries:
        console().print(f"{done}, because the weights are not quantized as it says: {', '.join(entries)}")


def print_partial_blocks(names: tuple[str, ...]) -> None:
    """Warn of float8 weights whose last blocks are not full."""
    if names:
        console().print(
            f"warning: {len(names)} float8 weights have rows or columns that are not a multiple of the block size. "
            f"Some readers take their scales differently (docs/fp8.md says which): {listing(names)}"
        )
