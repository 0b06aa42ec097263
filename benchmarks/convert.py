"""Time and memory of conversions, compared with a copy of the source.

    python benchmarks/convert.py --work DIR [--gigabytes 8] [--workers 1 --workers 2] [--json FILE]

Makes a Llama checkpoint of random bits in DIR, which needs space for four times its size. Before every run, the pages
of its input files are dropped from the cache. The unit of time is `cp --reflink=never` of the source and a sync. Memory
is the largest resident set of one process, including torch, as the operating system reports it (VmHWM).
"""

from __future__ import annotations

import filecmp
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.safetensors_writer import HuggingFaceWriter
from megatron_fp32.weights.model_map import map_model
from megatron_fp32.weights.spec import TensorSpec
from megatron_fp32.weights.tensors import TensorInfo

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 8192,
}
BYTES_OF_A_LAYER = 436_224_000


def make_source(directory: Path, gigabytes: float) -> None:
    """Make a checkpoint of at least this size."""
    layers = max(1, -(-int(gigabytes * 1e9 - 2 * 128256 * 4096 * 2) // BYTES_OF_A_LAYER))
    config = {**CONFIG, "num_hidden_layers": layers}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    specs = {s.name: s for m in map_model(config, names, stacked=False).mappings for s in m.hf}
    infos = {name: TensorInfo(dtype=torch.bfloat16, shape=spec.shape) for name, spec in specs.items()}
    writer, random = HuggingFaceWriter(directory, infos), np.random.default_rng(0)
    for spec in specs.values():
        writer.write(spec.name, _finite(spec, random))
    writer.finish()


def _finite(spec: TensorSpec, random: np.random.Generator) -> torch.Tensor:
    bits = random.integers(0, 2**16, size=spec.shape, dtype=np.uint16)
    # Neither infinite nor NaN, because float8 cannot hold them.
    bits &= np.uint16(0xBFFF)
    return torch.from_numpy(bits).view(torch.bfloat16)


def cool(*directories: Path) -> None:
    """Drop the pages of these files from the cache."""
    subprocess.run(["sync"], check=True)
    for path in (p for directory in directories for p in directory.rglob("*") if p.is_file()):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def copied(source: Path, out: Path) -> float:
    """Seconds that a copy of the source takes."""
    cool(source)
    start = time.monotonic()
    subprocess.run(["cp", "--reflink=never", "-r", str(source), str(out)], check=True)
    subprocess.run(["sync"], check=True)
    seconds = time.monotonic() - start
    shutil.rmtree(out)
    return seconds


RUN = """
import json, sys, time
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
if __name__ == "__main__":
    what, source, out, workers = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    start = time.monotonic()
    if what == "import":
        import_checkpoint(source, out, workers=workers)
    elif what == "export":
        export_checkpoint(source, out, workers=workers)
    else:
        quantize_checkpoint(source, out, "blockwise", workers=workers)
    print(json.dumps({"seconds": time.monotonic() - start}))
"""


def converted(what: str, source: Path, out: Path, workers: int) -> dict[str, float]:
    """Seconds of a conversion in a new process, and the largest resident set of one of its processes."""
    cool(source)
    script = out.parent / "run.py"
    script.write_text(RUN)
    command = [sys.executable, str(script), what, str(source), str(out), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    largest = 0
    while process.poll() is None:
        largest = max(largest, *map(high_water, [process.pid, *descendants(process.pid)]))
        time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{what} failed")
    assert process.stdout is not None
    found: dict[str, float] = json.loads(process.stdout.read())
    return {**found, "rss": largest}


def high_water(process: int) -> int:
    """The largest resident set that a process has had, in bytes; 0 if the process has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def descendants(process: int) -> list[int]:
    """The child processes of a process, and their child processes."""
    try:
        children = [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []
    return [*children, *(below for child in children for below in descendants(child))]


def check(source: Path, exported: Path) -> None:
    """Raise unless every file with weights is equal to the source's."""
    with HuggingFaceReader(source) as a, HuggingFaceReader(exported) as b:
        names = a.tensors.keys()
        if names != b.tensors.keys():
            raise SystemExit("the export has other tensors than the source")
        different = [n for n in names if not torch.equal(a.read(n).view(torch.int16), b.read(n).view(torch.int16))]
    if different or not filecmp.cmp(source / "config.json", exported / "config.json", shallow=False):
        raise SystemExit(f"the export is not the source: {different[:5]}")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--gigabytes", default=8.0, show_default=True)
@click.option("--workers", multiple=True, default=(1, 2), show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(work: Path, gigabytes: float, workers: tuple[int, ...], json_path: Path | None) -> None:
    source = work / "hf"
    make_source(source, gigabytes)
    nbytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    with HuggingFaceReader(source) as reader:
        largest = max(info.nbytes for info in reader.tensors.values())
    rows: list[dict[str, Any]] = []
    for count in workers:
        for what in ("import", "export", "quantize"):
            # One copy before and one after: a disk's speed changes.
            before = copied(source, work / "copy")
            out = work / f"{what}{count}"
            row = converted(what, work / f"import{count}" if what == "export" else source, out, count)
            after = copied(source, work / "copy")
            row |= {"what": what, "workers": count, "copies_seconds": [before, after]}
            row |= {"ratio": 2 * row["seconds"] / (before + after)}
            rows.append(row)
            print(
                f"{what:9} {count} workers  {row['seconds']:6.1f} s  {nbytes / row['seconds'] / 1e9:5.2f} GB/s  "
                f"{row['ratio']:5.2f} of a copy ({before:.1f} s, {after:.1f} s)  "
                f"memory {row['rss'] / 1e9:5.2f} GB, {(row['rss'] - 0.7e9) / largest:.2f} largest tensors + 0.7 GB",
                flush=True,
            )
            if what == "export":
                check(source, out)
            if what != "import":
                shutil.rmtree(out)
        shutil.rmtree(work / f"import{count}")
    if json_path is not None:
        machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
        result = {"command": " ".join(sys.argv), "nbytes": nbytes, "largest_tensor": largest, **machine, "rows": rows}
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
