"""Convert a Qwen3.5 checkpoint from Hugging Face to Megatron, train it, convert it back, and check that no bit is lost.

Runs on the CPU with two tensor-parallel ranks over gloo. After each step (build, wrap, load, train, resume, export),
called a station in the report, the kept parameters are compared. Writes `demo-report.json`, and exits with status 1
if a station changed a bit that it must keep.

    python examples/demo.py [--hf-dir DIR]
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import demo_ranks
import torch
from demo_ranks import KEPT, describe
from rich.console import Console
from rich.table import Table
from torch import Tensor

from megatron_fp32.checkpoint.formats.digests import digest
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.sidecar import find_sidecar
from megatron_fp32.models.provider import read_hf_config
from megatron_fp32.testing.cpu import cpu_megatron
from megatron_fp32.testing.qwen3_5 import load_qwen3_5, write_qwen3_5
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.testing.training import Batch

HEAD_GAIN = 50
END_TO_END = 1e-5

TEXT = """fp32 where it decides the result: the logits of the output layer, the log-probabilities taken from them, and
the parameters of the gated delta net that are exponentiated or that scale every head. All else stays in bf16, at bf16
speed, and what came out of a checkpoint in fp32 goes back into one in fp32, bit for bit, however often it was sharded,
wrapped, trained, saved and loaded on the way. A tensor leaves with the bytes and the dtype that it came with."""

console = Console(highlight=False)


@click.command()
@click.option("--hf-dir", type=click.Path(exists=True, file_okay=False, path_type=Path), help="A checkpoint of yours.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True)
@click.option("--report", "report_path", type=click.Path(path_type=Path), default=Path("demo-report.json"))
def main(hf_dir: Path | None, out: Path, report_path: Path) -> None:
    """Convert a Qwen3.5 text checkpoint to Megatron, train it and convert it back. Report every step's effect."""
    make_room(out, hf_dir)
    report: dict[str, Any] = {"stations": {}, "checks": {}}
    if hf_dir is None:
        with step("transformers writes a Qwen3.5 checkpoint"):
            hf_dir = write_qwen3_5(out / "hf", **DEMO_MODEL)
    run_demo(hf_dir, out, report)
    report_path.write_text(json.dumps(report, indent=2) + "\n")
    show(report)
    failed = [name for name, check in report["checks"].items() if not check["ok"]]
    if failed:
        console.print(f"[red]failed: {', '.join(failed)}[/]")
        sys.exit(1)
    console.print(f"[green]all {len(report['checks'])} checks passed[/]; the report is in {report_path}")


DEMO_MODEL: dict[str, Any] = {
    "vocab_size": 2003,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 64,
}


def run_demo(hf_dir: Path, out: Path, report: dict[str, Any]) -> None:
    """Run every part of the demonstration, and fill `report`."""
    megatron = out / "megatron"
    with step("import"):
        command("import", "--text-only", hf_dir, megatron)
    vocab = read_hf_config(hf_dir).vocab_size
    batch = text_batch(vocab)
    stations = report["stations"]
    stations["HF file"] = hf_station(hf_dir, megatron)
    stations["torch_dist file"] = torch_dist_station(megatron)

    with RankPool(demo_ranks.TENSOR_PARALLEL, setup=cpu_megatron, timeout=1200) as pool:
        with step("build, wrap and load on two ranks"):
            stations.update(pool.run(demo_ranks.wrapping_stations, hf_dir, megatron)[0])
        log_prob_checks(report, pool, hf_dir, megatron, batch)
        with step("train 6 steps with the distributed optimizer"):
            straight = pool.run(demo_ranks.train, hf_dir, megatron, [batch], steps=6, start=None, save=None)
        saved = made(out / "after-3")
        with step("train 3 steps and save"):
            pool.run(demo_ranks.train, hf_dir, megatron, [batch], steps=3, start=None, save=saved)
        untouched = made(out / "loaded-and-saved")
        with step("load and save without a step"):
            pool.run(demo_ranks.load_and_save, hf_dir, megatron, untouched)
    final = made(out / "after-6")
    with (
        RankPool(demo_ranks.TENSOR_PARALLEL, setup=cpu_megatron, timeout=1200) as fresh,
        step("resume on fresh ranks for 3 steps"),
    ):
        resumed = fresh.run(demo_ranks.train, hf_dir, megatron, [batch], steps=3, start=saved, save=final)
    stations["a step"] = straight[0]["stations"]["a step"]
    stations["6 straight steps"] = straight[0]["stations"]["end"]
    stations["3 + resume + 3"] = resumed[0]["stations"]["end"]
    training_checks(report, straight, resumed)

    for name, source in {"import": megatron, "load and save": untouched, "training": final}.items():
        with step(f"export after {name}"):
            target = out / f"exported-after-{name.replace(' ', '-')}"
            command("export", source, target, "--source", megatron)
            stations[f"export after {name}"] = hf_station(target, megatron)
            load_qwen3_5(target)
            export_check(report, name, hf_dir, target, megatron)
    station_checks(report)


def log_prob_checks(report: dict[str, Any], pool: RankPool, hf_dir: Path, megatron: Path, batch: Batch) -> None:
    """Compare the output layer with float64, and the whole model with transformers in float32."""
    with step("the head alone, against float64"):
        head = pool.run(demo_ranks.head_errors, hf_dir, megatron, batch)[0]
    gain = head["stock"] / head["fp32"]
    report["head"] = {**head, "gain": gain}
    check(
        report, "head", gain >= HEAD_GAIN, f"error of the stock layer / fp32 layer = {gain:.0f} (at least {HEAD_GAIN})"
    )

    with step("end to end, against transformers in float32"):
        with torch.no_grad():
            truth = demo_ranks.log_probs(load_qwen3_5(hf_dir)(batch.tokens).logits, batch)
        errors = {}
        for name, bf16, fp32_head in (
            ("fp32 body, fp32 head", False, True),
            ("bf16 body, fp32 head", True, True),
            ("bf16 body, stock head", True, False),
        ):
            ours: Tensor = pool.run(demo_ranks.end_to_end, hf_dir, megatron, batch, bf16=bf16, fp32_head=fp32_head)[0]
            difference = (ours - truth).abs()
            errors[name] = {"max": float(difference.max()), "mean": float(difference.mean())}
    report["end_to_end"] = errors
    worst = errors["fp32 body, fp32 head"]["max"]
    check(
        report, "end to end in fp32", worst <= END_TO_END, f"largest log-prob error {worst:.1e} (at most {END_TO_END})"
    )
    check(report, "the fp32 path ran", min(head["calls"].values()) > 0, f"calls {head['calls']}")


def training_checks(report: dict[str, Any], straight: list[Any], resumed: list[Any]) -> None:
    """Check that the loss falls, and that a resumed run equals the uninterrupted run in every bit."""
    losses = straight[0]["losses"]
    report["losses"] = {"straight": losses, "resumed": resumed[0]["losses"]}
    report["optimizer_repairs"] = straight[0]["repairs"]
    check(report, "the loss falls", losses[-1] < losses[0], f"{losses[0]:.4f} -> {losses[-1]:.4f}")
    for kind in ("parameters", "optimizer"):
        pairs = [(a[kind], b[kind]) for a, b in zip(straight, resumed, strict=True)]
        total = sum(len(a) for a, _ in pairs)
        equal = sum(a[name] == b.get(name) for a, b in pairs for name in a)
        report[f"resume_{kind}"] = {"tensors": total, "equal": equal}
        check(report, f"resume: {kind}", total == equal, f"{equal} of {total} tensors equal after 3 + 3 and 6 steps")
    calls = [run["calls"] for run in (*straight, *resumed)]
    report["calls"] = calls[0]
    ran = all(min(c.values()) > 0 for c in calls)
    check(report, "the fp32 path trained", ran, f"calls {calls[0]} on a rank")


def export_check(report: dict[str, Any], name: str, hf_dir: Path, target: Path, megatron: Path) -> None:
    """Compare an export with the source, tensor by tensor, in bytes and dtype."""
    wanted = find_sidecar(megatron).tensors
    with HuggingFaceReader(hf_dir) as source, HuggingFaceReader(target) as exported:
        same_names = exported.tensors.keys() == wanted.keys()
        shared = wanted.keys() & exported.tensors.keys()
        # Tensors that were trained in fp32 from a 16-bit source are exported as F32.
        allowed = {n: {source.tensors[n].dtype, *([torch.float32] if name == "training" else [])} for n in shared}
        same_dtypes = all(exported.tensors[n].dtype in allowed[n] for n in shared)
        equal = sum(digest(exported.read(n)) == digest(source.read(n)) for n in shared)
    report.setdefault("exports", {})[name] = {"tensors": len(wanted), "equal": equal}
    ok = same_names and same_dtypes and (equal == len(wanted) or name == "training")
    check(report, f"export after {name}", ok, f"{equal} of {len(wanted)} tensors byte-equal, names and dtypes the same")


def station_checks(report: dict[str, Any]) -> None:
    """Check that no station changes dtypes or bits of the station before it."""
    stations = report["stations"]
    same = [
        ("HF file", "torch_dist file", "load", "export after import", "export after load and save"),
        ("build", "Float16Module", "DDP"),
        ("6 straight steps", "3 + resume + 3", "export after training"),
    ]
    for kind in KEPT:
        source = stations["HF file"][kind]
        for names in same:
            found = {stations[name][kind]["digest"] for name in names}
            check(report, f"{kind}: {' = '.join(names)}", len(found) == 1, f"{len(found)} different digests")
        in_files = {n for n in stations if "file" in n or n.startswith("export")}
        held = [n for n, s in stations.items() if s[kind]["dtype"] != "float32" and n not in in_files]
        check(report, f"{kind} is float32 in the model", not held, f"not float32 at: {held or 'none'}")
        trained = stations["a step"][kind]
        moved = trained["digest"] != source["digest"] and trained["beyond_bf16"] > 0.5
        check(report, f"{kind} trains in fp32", moved, f"{trained['beyond_bf16']:.0%} of the values beyond bf16")


def hf_station(directory: Path, megatron: Path) -> dict[str, Any]:
    """The kept parameters in a Hugging Face directory."""
    suffixes = {"A_log": "linear_attn.A_log", "out_norm.weight": "linear_attn.norm.weight"}
    names = list(find_sidecar(megatron).tensors)
    with HuggingFaceReader(directory) as reader:
        return {k: describe([reader.read(n) for n in names if n.endswith(s)]) for k, s in suffixes.items()}


def torch_dist_station(megatron: Path) -> dict[str, Any]:
    """The kept parameters in the imported checkpoint, as Hugging Face stores them."""
    from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
    from megatron_fp32.weights.model_map import map_model
    from megatron_fp32.weights.restore import Restorer

    sidecar = find_sidecar(megatron)
    restorer = Restorer(TorchDistReader(megatron), sidecar.originals())
    found: dict[str, list[Tensor]] = {kind: [] for kind in KEPT}
    for mapping in map_model(sidecar.hf_config, sidecar.tensors.keys()).mappings:
        for kind in KEPT:
            if mapping.megatron[0].name.endswith(kind):
                found[kind] += restorer.restore(mapping).hf
    return {kind: describe(tensors) for kind, tensors in found.items()}


def text_batch(vocab: int) -> Batch:
    """Two rows of real text, with one token for each byte."""
    ids = torch.tensor([byte % vocab for byte in TEXT.encode()])
    length = 192
    rows = torch.stack([ids[: length + 1], ids[-length - 1 :]])
    return Batch(tokens=rows[:, :-1].contiguous(), labels=rows[:, 1:].contiguous())


def command(*arguments: object) -> None:
    """Run the command `megatron-fp32`."""
    program = Path(sys.executable).parent / "megatron-fp32"
    subprocess.run([str(program), *map(str, arguments)], check=True)


def make_room(out: Path, hf_dir: Path | None) -> None:
    """Make an empty directory `out`. Only the output of an earlier demonstration is removed."""
    marker = out / "made-by-demo"
    if hf_dir is not None and out.resolve() in (hf_dir.resolve(), *hf_dir.resolve().parents):
        raise click.UsageError(f"{hf_dir} lies in {out}, which the demonstration clears; pass another --out")
    if out.exists() and not marker.exists():
        raise click.UsageError(f"{out} exists and no demonstration made it; pass another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()


def made(directory: Path) -> Path:
    """Make a directory, and return it."""
    directory.mkdir(parents=True)
    return directory


def check(report: dict[str, Any], name: str, ok: bool, detail: str) -> None:
    """Record the result of a check."""
    report["checks"][name] = {"ok": bool(ok), "detail": detail}


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Print the name of a step, and how long it took."""
    start = time.monotonic()
    console.print(f"[bold]{what}[/] ...")
    yield
    console.print(f"    {time.monotonic() - start:.1f} s")


def show(report: dict[str, Any]) -> None:
    """Print the report for a person."""
    for kind in KEPT:
        table = Table(
            "station", "dtype", "digest", "beyond bf16", title=f"{kind}, all layers, in Hugging Face's convention"
        )
        for name, station in report["stations"].items():
            row = station[kind]
            table.add_row(name, row["dtype"], row["digest"], f"{row['beyond_bf16']:.1%}")
        console.print(table)
    errors = Table("log-probs", "max error", "mean error", title="against transformers in float32")
    for name, error in report["end_to_end"].items():
        errors.add_row(name, f"{error['max']:.2e}", f"{error['mean']:.2e}")
    console.print(errors)
    head = report["head"]
    console.print(
        f"head alone, RMS error of log-probs against float64: stock {head['stock']:.2e}, fp32 {head['fp32']:.2e}; "
        f"logits have a standard deviation of {head['logits_std']:.1f}"
    )
    console.print("losses: " + " ".join(f"{loss:.4f}" for loss in report["losses"]["straight"]))
    checks = Table("check", "", "found")
    for name, outcome in report["checks"].items():
        checks.add_row(name, "[green]ok[/]" if outcome["ok"] else "[red]FAILED[/]", outcome["detail"])
    console.print(checks)


if __name__ == "__main__":
    main()
