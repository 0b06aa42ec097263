"""Time and error of the output layer's logits and gradients, compared with bare matrix products of equal shapes.

    python benchmarks/linear_logits.py [--tokens 8192 --hidden 4096 --vocab 151936] [--json FILE]

Needs a CUDA device. Every ratio is measured within one run, and every error belongs to the output that was timed.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click
import torch
from timing import time_one
from torch import Tensor

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.products.grad_precision import GradPrecision


@click.command()
@click.option("--tokens", default=8192, show_default=True)
@click.option("--hidden", "hidden_size", default=4096, show_default=True)
@click.option("--vocab", default=151936, show_default=True)
@click.option("--repeats", default=20, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(tokens: int, hidden_size: int, vocab: int, repeats: int, json_path: Path | None) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device="cuda").bfloat16()
    weight = (torch.randn(vocab, hidden_size, device="cuda") / hidden_size**0.5).bfloat16()
    labels = torch.randint(vocab, (tokens,), device="cuda")
    rows = [
        *forward_rows(hidden, weight, repeats),
        *backward_rows(hidden, weight, labels, repeats),
    ]
    width = max(len(row["what"]) for row in rows)
    for row in rows:
        error = "" if row["error"] is None else f"error {row['error']:.2e}"
        peak = f"peak +{row['peak_gib']:.2f} GiB" if "peak_gib" in row else ""
        print(f"{row['what']:{width}}  {row['ms']:8.2f} ms  {row['ratio']:6.3f}x  {error:14}  {peak}")
    if json_path is not None:
        machine = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        }
        shapes = {"tokens": tokens, "hidden": hidden_size, "vocab": vocab}
        result = {"command": " ".join(sys.argv), **machine, **shapes, "rows": rows}
        json_path.write_text(json.dumps(result, indent=1) + "\n")


def forward_rows(hidden: Tensor, weight: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Rows for logits. The unit of time is a bare bf16 product with bf16 output."""
    sample = torch.arange(0, hidden.shape[0], 64, device="cuda")
    truth = hidden[sample].double() @ weight.double().t()
    ways: dict[str, Callable[[], Tensor]] = {
        "logits: bare bf16 product": lambda: hidden @ weight.t(),
        "logits: bf16 product, then .float() (stock)": lambda: (hidden @ weight.t()).float(),
        "logits: fp32 upcast of both operands": lambda: hidden.float() @ weight.float().t(),
        "logits: fp32_logits": lambda: fp32_logits(hidden, weight),
    }
    rows: list[dict[str, Any]] = []
    for what, way in ways.items():
        ms, _, output = time_one(way, repeats=repeats if "upcast" not in what else 3)
        unit = rows[0]["ms"] if rows else ms
        rows.append({"what": what, "ms": ms, "ratio": ms / unit, "error": relative_error(output[sample], truth)})
        del output
    return rows


def backward_rows(hidden: Tensor, weight: Tensor, labels: Tensor, repeats: int) -> list[dict[str, Any]]:
    """Rows for dX and dW of a softmax gradient. The unit is the two bare bf16 products. dW is added to `main_grad`."""
    grad = softmax_gradient(hidden, weight, labels)
    sample = torch.arange(0, hidden.shape[0], 64, device="cuda")
    columns = torch.arange(0, weight.shape[0], 1024, device="cuda")
    hidden_truth = grad[sample].double() @ weight.double()
    weight_truth = grad[:, columns].double().t() @ hidden.double()
    bare_ms, bare = bare_products(hidden, weight, grad.bfloat16(), repeats)
    rows = [
        {
            "what": "backward: two bare bf16 products, dX",
            "ms": bare_ms,
            "ratio": 1.0,
            "error": relative_error(bare[sample], hidden_truth),
        }
    ]
    weight = weight.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
    weight.grad_added_to_main_grad = False
    zero_ms = time_one(weight.main_grad.zero_, repeats=repeats).ms
    for precision in get_args(GradPrecision):
        # For an fp32 residual stream dX is fp32, which shows errors that rounding to bf16 hides.
        for dtype, name in ((torch.bfloat16, "bf16 hidden"), (torch.float32, "fp32 hidden")):
            ms, peak, hidden_grad = timed_backward(hidden.to(dtype), weight, grad, precision, repeats)
            measured = {"ms": ms - zero_ms, "ratio": (ms - zero_ms) / bare_ms, "peak_gib": peak}
            what = f"backward: {precision}, {name}"
            rows.append({"what": f"{what}, dX", **measured, "error": relative_error(hidden_grad[sample], hidden_truth)})
            error = relative_error(weight.main_grad[columns], weight_truth)
            rows.append({"what": f"{what}, dW in main_grad (same pass)", **measured, "error": error})
    return rows


def bare_products(hidden: Tensor, weight: Tensor, low: Tensor, repeats: int) -> tuple[float, Tensor]:
    """Median milliseconds of dX and dW as two bare products of a bf16 dY, and dX."""
    timing = time_one(lambda: (low @ weight, low.t() @ hidden)[0], repeats=repeats)
    return timing.ms, timing.output


def timed_backward(
    hidden: Tensor, weight: Tensor, grad: Tensor, precision: GradPrecision, repeats: int
) -> tuple[float, float, Tensor]:
    """Median milliseconds of zeroing `main_grad` and one backward pass, its peak of new memory in GiB, and dX."""
    leaf = hidden.clone().requires_grad_()
    logits = fp32_logits(leaf, weight, grad_precision=precision)

    def backward() -> Tensor:
        weight.main_grad.zero_()
        return torch.autograd.grad(logits, (leaf, weight), grad, retain_graph=True)[0]

    ms, peak, hidden_grad = time_one(backward, repeats=repeats)
    return ms, peak / 2**30, hidden_grad


def softmax_gradient(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """softmax(logits) - one-hot, in fp32, with the label's logit raised so that its probability is near 0.7."""
    logits = fp32_logits(hidden, weight)
    rows = torch.arange(labels.numel(), device=labels.device)
    logits[rows, labels] = logits.logsumexp(-1) + 0.85
    gradient = logits.softmax(-1)
    gradient[rows, labels] -= 1
    return gradient / labels.numel()


if __name__ == "__main__":
    main()
