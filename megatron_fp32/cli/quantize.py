"""`megatron-fp32 quantize`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import get_args

import click

from megatron_fp32.cli import options
from megatron_fp32.cli.hub import HubId, local
from megatron_fp32.cli.progress import progress
from megatron_fp32.cli.report import print_claims, print_partial_blocks
from megatron_fp32.cli.terminal import console, errors_exit, print_json
from megatron_fp32.weights.choices import Fp8Format


@click.command("quantize", short_help="Hugging Face -> float8 for inference engines.")
@click.argument("hf_dir", type=options.SOURCE)
@click.argument("fp8_dir", type=options.NEW)
@click.option("--scheme", type=click.Choice(get_args(Fp8Format)), help="The float8 format to write.")
@click.option(
    "--like",
    type=options.EXISTING,
    help="Write the format of the float8 checkpoint in this directory. Its config files are enough.",
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where to quantize, such as cuda:0. The result is the same."
)
@options.max_shard_bytes
@options.workers
@options.as_json
def command(
    hf_dir: Path | HubId,
    fp8_dir: Path,
    scheme: Fp8Format | None,
    like: Path | None,
    device: str,
    max_shard_bytes: int,
    workers: int,
    as_json: bool,
) -> None:
    """Convert the 16-bit safetensors in HF_DIR into FP8_DIR, a float8 checkpoint for inference engines.

    HF_DIR is a directory, or the id of a repository on the Hugging Face Hub. FP8_DIR must not exist. Pass --scheme or
    --like. The large projections of the text model's layers become float8. Norms, routers, embeddings, heads and vision
    towers keep their bytes.
    """
    with errors_exit(1, output=fp8_dir):
        chosen = options.chosen_scheme(scheme, like, names="--scheme and --like")
        if chosen is None:
            raise click.UsageError("pass either --scheme or --like")
        source = local(hf_dir)
    with errors_exit(1, output=fp8_dir), progress() as tell:
        from megatron_fp32.checkpoint.quantize import quantize_checkpoint

        report = quantize_checkpoint(
            source,
            fp8_dir,
            chosen,
            device=device,
            max_shard_bytes=max_shard_bytes,
            workers=workers,
            progress=tell,
        )
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    console().print(
        f"{report.directory}: {len(report.quantized)} weights in float8 ({report.scheme.format}), {len(report.kept)} "
        f"tensors as they were; {report.nbytes:,} bytes of {report.source_nbytes:,}, each tensor read back and equal"
    )
    print_claims(report.quantization_claims)
    print_partial_blocks(report.partial_blocks)
