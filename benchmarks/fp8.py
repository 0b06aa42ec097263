"""Time of the float8 quantizers, compared with a copy that moves equally many bytes.

    python benchmarks/fp8.py [--shape 12288,4096] [--json FILE]

Needs a CUDA device. For each weight, a quantizer reads 2 bytes (bfloat16) and writes 1 byte (float8). The unit of time
is a copy on the device that moves 3 bytes for each weight. Each quantizer alternates with the copy. Both start with a
cache full of other data, and the ratio is the ratio of the medians. The timed output is then compared with the CPU's
output, bit for bit.
"""

from __future__ import annotations

import functools
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from timing import take_turns
from torch import Tensor

from megatron_fp32.ops.fp8 import Quantized, kernels, quantize_blockwise, quantize_channelwise
from megatron_fp32.ops.fp8.reference import quantize_reference

SHAPES = ("12288,4096", "4096,12288", "151936,4096", "128,1536,4096", "2048,32768")
CHECKED_VALUES = 1 << 27
"""Number of values of an output that are compared with the CPU's output."""


def paired(way: Callable[[], Any], unit: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Median milliseconds of quantizer and copy, and the last output."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")

    def before(name: str) -> None:
        flush.zero_()
        # The device starts late, so that it never waits for the host.
        torch.cuda._sleep(2_000_000)

    found = take_turns({"unit": unit, "way": way}, repeats=repeats, warm_ups=1, before=before)
    return found["way"].ms, found["unit"].ms, found["way"].output


def copy_of(weight: Tensor) -> Callable[[], Any]:
    """A copy that reads and writes 1.5 bytes for each weight."""
    source = torch.empty(3 * weight.numel() // 2, dtype=torch.uint8, device="cuda")
    return functools.partial(torch.empty_like(source).copy_, source)


def check(output: Quantized, weight: Tensor, quantize: Callable[..., Quantized]) -> None:
    """Exit unless the output equals the CPU's output, and a corner of it equals the reference."""
    unit = 128 if weight.ndim == 2 else 1
    rows = min(len(weight), unit * max(1, CHECKED_VALUES // (unit * weight[0].numel())))
    expected = quantize(weight[:rows].cpu())
    scale = output.scale[: len(expected.scale)].cpu()
    codes = output.weight[:rows].cpu().view(torch.uint8)
    if not torch.equal(scale, expected.scale) or not torch.equal(codes, expected.weight.view(torch.uint8)):
        raise SystemExit("the output of the GPU differs from the output of the CPU")
    corner = (weight if weight.ndim == 2 else weight[0])[:128].cpu()
    block = (128, 128) if quantize is quantize_blockwise else (1, corner.shape[1])
    truth, scales = quantize_reference(corner, block)
    first = (codes if weight.ndim == 2 else codes[0])[:128]
    first_scales = (scale if weight.ndim == 2 else scale[0])[: len(scales)]
    if not torch.equal(first, truth) or not torch.equal(first_scales.double(), scales):
        raise SystemExit("the output differs from quantize_reference")


def rows_of(shape: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    """Time, check and print both quantizers on one shape."""
    torch.manual_seed(0)
    weight = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(std=0.02)
    found = []
    for name, quantize in (("block-wise", quantize_blockwise), ("channel-wise", quantize_channelwise)):
        ms, unit_ms, output = paired(functools.partial(quantize, weight, check=False), copy_of(weight), repeats)
        checked, _, _ = paired(functools.partial(quantize, weight), copy_of(weight), repeats)
        check(output, weight, quantize)
        row = {"shape": list(shape), "what": name, "ms": ms, "copy_ms": unit_ms, "ratio": ms / unit_ms}
        row |= {"tb_per_s": 3 * weight.numel() / ms / 1e9, "ms_with_check": checked}
        found.append(row)
        print(
            f"{shape!s:20} {name:13} {ms:7.3f} ms  copy {unit_ms:7.3f} ms  ratio {ms / unit_ms:5.3f}  "
            f"{row['tb_per_s']:5.2f} TB/s  with check {checked:7.3f} ms",
            flush=True,
        )
    return found


@click.command()
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="N,K or experts,N,K")
@click.option("--repeats", default=15, show_default=True)
@click.option("--block-values", default=kernels.BLOCK_VALUES_A_THREAD, show_default=True, help="of a block, a thread")
@click.option("--row-values", default=kernels.ROW_VALUES_A_THREAD, show_default=True, help="of a row, a thread")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(shapes: tuple[str, ...], repeats: int, block_values: int, row_values: int, json_path: Path | None) -> None:
    kernels.BLOCK_VALUES_A_THREAD, kernels.ROW_VALUES_A_THREAD = block_values, row_values
    rows = [row for shape in shapes for row in rows_of(tuple(map(int, shape.split(","))), repeats)]
    if json_path is not None:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        result = {"command": " ".join(sys.argv), **machine, "python": platform.python_version(), "rows": rows}
        json_path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
