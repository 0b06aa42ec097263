"""Real pretraining runs with Megatron's own loop: loss curves, resumption, export.

    python benchmarks/pretrain_qwen3_5.py [--iterations 300] [--gpus 2] [--json FILE]

Writes a Qwen3.5 with transformers, imports it, and runs `examples/pretrain.py` from it under torchrun, three times in
Megatron's deterministic mode:

1. with fp32 logits and fp32 parameters;
2. resumed from the checkpoint in the middle of run 1. The last checkpoints of both runs are compared tensor by tensor,
   including the optimizer;
3. with stock megatron-core, at the time of run 1 on its GPU.

The last checkpoint of run 1 is exported and loaded in transformers. With two GPUs, the runs use tensor parallelism with
sequence parallelism.

Needs CUDA, Transformer Engine, megatron-core with megatron.training, and transformers.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.testing.qwen3_5 import TINY_QWEN3_5, write_qwen3_5

EXAMPLE = Path(__file__).parents[1] / "examples" / "pretrain.py"
STOCK = ["--no-fp32-logits", "--fp32-gated-delta-net"]
MODEL = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


@click.command()
@click.option("--iterations", default=300, show_default=True)
@click.option("--gpus", default=1, show_default=True, help="Tensor-parallel size.")
@click.option("--seq-length", default=512, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("pretrain-out"), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
@click.option("--tiny", is_flag=True, help="A model of 128 dimensions, to try this out.")
@click.option("--launch", help="Command that runs a script, instead of torchrun.")
@click.option("--flags", default="", help="More flags for Megatron.")
def main(
    iterations: int,
    gpus: int,
    seq_length: int,
    work: Path,
    json_path: Path | None,
    tiny: bool,
    launch: str | None,
    flags: str,
) -> None:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    model = TINY_QWEN3_5 if tiny else MODEL
    hf = write_qwen3_5(work / "hf", **model)
    import_checkpoint(hf, work / "imported")
    launcher = shlex.split(launch or f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {gpus}")
    run = Run([*launcher, str(EXAMPLE), "--hf-dir", str(hf)], gpus=gpus, seq_length=seq_length, flags=flags)
    half = iterations // 2
    with ThreadPoolExecutor() as pool:
        stock = pool.submit(run.train, work / "stock", iterations, start=work / "imported", more=STOCK)
        curves = {"fp32": run.train(work / "fp32", iterations, start=work / "imported", save_every=half)}
        result = {
            "command": " ".join(sys.argv),
            **machine(),
            "megatron_flags": run.flags,
            "model": model,
            "resume": resumed(run, work, iterations, curves["fp32"]),
            "export": exported(work),
            "curves": curves,
        }
        curves["stock"] = stock.result()
    for name, losses in curves.items():
        print(f"{name}: loss {losses[0]:.4f} -> {losses[-1]:.6f} in {len(losses)} iterations")
    if json_path is not None:
        json_path.write_text(json.dumps(result, indent=1) + "\n")


class Run:
    """Runs Megatron with common flags."""

    def __init__(self, command: list[str], *, gpus: int, seq_length: int, flags: str) -> None:
        self.command = command
        self.flags = [
            "--tensor-model-parallel-size", str(gpus), *(["--sequence-parallel"] if gpus > 1 else []),
            "--deterministic-mode", "--bf16", "--use-distributed-optimizer", "--mock-data", "--num-workers", "0",
            "--seq-length", str(seq_length), "--max-position-embeddings", str(seq_length),
            "--micro-batch-size", "2", "--global-batch-size", "4",
            "--no-gradient-accumulation-fusion",  # megatron-core's output layer needs Apex for this fusion
            "--lr", "3e-4", "--min-lr", "3e-5", "--lr-warmup-fraction", "0.1", "--lr-decay-style", "cosine",
            "--clip-grad", "1.0", "--log-interval", "1", "--eval-iters", "0", "--eval-interval", "100000",
            *shlex.split(flags),
        ]  # fmt: skip

    def train(
        self,
        save: Path,
        iterations: int,
        *,
        start: Path,
        more: Sequence[str] = (),
        fresh: bool = True,
        save_every: int = 0,
    ) -> list[float]:
        """The losses of all iterations, from the log. `fresh` only loads weights, and starts at iteration 0."""
        begin = time.monotonic()
        command = [*self.command, *self.flags, *more, "--train-iters", str(iterations)]
        command += ["--load", str(start), *(["--finetune"] if fresh else [])]
        if save_every:
            command += ["--save", str(save), "--save-interval", str(save_every)]
        log = save.with_suffix(".log")
        with log.open("w") as out:
            # Megatron needs these two for sequence parallelism and for deterministic mode.
            env = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_ALGO": "Ring"}
            env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
            ended = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env, check=False)
        text = log.read_text()
        if ended.returncode != 0:
            # Under torchrun, many lines follow the error messages of the ranks.
            last = [line for line in text.splitlines() if line.startswith("[rank")] or text.splitlines()
            raise SystemExit("\n".join([" ".join(command), f"ended with {ended.returncode}:", *last[-20:]]))
        print(f"{save.name}: {time.monotonic() - begin:.0f} s", flush=True)
        losses = [float(value) for value in re.findall(r"lm loss: ([0-9.E+-]+)", text)]
        # Megatron does not reset its sums after the first iteration of a run, and prints the mean of two at the second.
        return [losses[0], float(f"{2 * losses[1] - losses[0]:.6e}"), *losses[2:]]


def resumed(run: Run, work: Path, iterations: int, straight: list[float]) -> dict[str, Any]:
    """Repeat the second half of the fp32 run from its checkpoint, and compare the last checkpoints of both runs."""
    half = iterations // 2
    start = work / "half"
    start.mkdir()
    shutil.copytree(work / "fp32" / f"iter_{half:07d}", start / f"iter_{half:07d}")
    (start / "latest_checkpointed_iteration.txt").write_text(str(half))
    again = run.train(work / "resumed", iterations, start=start, fresh=False, save_every=iterations)
    a, b = TorchDistReader(work / "fp32"), TorchDistReader(work / "resumed")
    names = [name for name in a.tensors if not name.startswith(("rng_state", "rerun_state"))]
    different = [name for name in names if not torch.equal(as_bytes(a.read(name)), as_bytes(b.read(name)))]
    equal_losses = all(abs(x - y) < 2e-5 * x for x, y in zip(straight[half:], again, strict=True))
    optimizer = sum(name.startswith("optimizer.") for name in names)
    print(
        f"resumed after {half} of {iterations} iterations: {len(names) - len(different)} of {len(names)} tensors "
        f"({optimizer} of them the optimizer's) equal in every bit; losses equal as printed: {equal_losses}"
    )
    return {
        "iterations": iterations,
        "tensors": len(names),
        "optimizer_tensors": optimizer,
        "different": different,
        "equal_losses": equal_losses,
        "losses": again,
    }


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def exported(work: Path) -> dict[str, Any]:
    """Export the end of the fp32 run and load it in transformers."""
    from transformers.models import qwen3_5

    report = export_checkpoint(work / "fp32", work / "exported", source=work / "imported")
    model, loading = qwen3_5.Qwen3_5ForCausalLM.from_pretrained(
        work / "exported", dtype="auto", output_loading_info=True
    )
    problems = {name: sorted(map(str, value)) for name, value in loading.items() if value}
    # flash-linear-attention, if it is installed, only takes CUDA tensors.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        finite = bool(model.to(device)(torch.arange(1, 65, device=device)[None]).logits.isfinite().all())
    print(
        f"exported {report.tensors} tensors, {report.unchanged} of them unchanged; "
        f"transformers: {problems or 'no complaints'}, logits finite: {finite}"
    )
    return {"tensors": report.tensors, "unchanged": report.unchanged, "transformers": problems, "finite": finite}


def machine() -> dict[str, Any]:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"gpu": name, "torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}


if __name__ == "__main__":
    main()
