"""Time, memory and error of log-probs, entropy, loss and gradients without stored logits, also of other libraries.

    python benchmarks/linear_logprobs.py [--shape 8192,4096,151936] [--json FILE]
    torchrun --nproc-per-node 2 benchmarks/linear_logprobs.py ...

Needs a CUDA device. Liger, Cut Cross Entropy and megatron-core are measured if they are installed. Every row alternates
with its unit: the bare bf16 products that its algorithm needs at least. The row shows the ratio of the medians. Errors
are errors of the timed output against float64. With several processes, each has its rows of the vocabulary, and the
unit is the bare products of these rows.

Hidden states point towards their labels' rows by a random amount. So the probabilities of the labels spread from 1e-4
to 1 - 1e-5, as in a trained model.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from timing import take_turns
from torch import Tensor

from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import VocabParallel, linear_logprobs, weighted_cross_entropy
from megatron_fp32.ops.products.fixed_order import fixed_order_product

SHAPES = ("8192,4096,151936", "8192,7168,129280")
GIB = 2**30


class Problem:
    """The operands of one shape, float64 results of a sample, and the units of time."""

    def __init__(self, tokens: int, hidden: int, vocab: int, group: dist.ProcessGroup | None) -> None:
        ranks, rank = (1, 0) if group is None else (dist.get_world_size(group), dist.get_rank(group))
        torch.manual_seed(0)
        self.name = f"T={tokens} H={hidden} V={vocab}" + (f" TP={ranks}" if ranks > 1 else "")
        whole = (torch.randn(vocab, hidden, device="cuda") / hidden**0.5).bfloat16()
        self.labels = torch.randint(vocab, (tokens,), device="cuda")
        towards = torch.empty(tokens, 1, device="cuda").uniform_(4, 24)
        x = torch.randn(tokens, hidden, device="cuda") + towards * whole[self.labels].float()
        self.hidden = x.bfloat16().requires_grad_()
        # Megatron's padding, which one rank does not need.
        columns = -(-vocab // (128 * ranks)) * 128 if ranks > 1 else vocab
        self.parallel = VocabParallel(group=group, vocab_size=vocab)
        first = columns * rank
        self._truth(whole, first, min(columns, vocab - first))
        # A copy, because a view would keep the whole weight in memory.
        self.weight = torch.zeros(columns, hidden, device="cuda", dtype=torch.bfloat16)
        self.weight[: vocab - first] = whole[first : first + columns]
        self.weight.requires_grad_()
        self.main_grad = self.weight.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)
        self.weight.grad_added_to_main_grad = False
        # A Parameter with the weight's memory, but without main_grad.
        self.plain_weight = self.weight.detach().requires_grad_()
        self.weights = torch.full((tokens,), 1 / tokens, device="cuda")
        self.low = torch.randn(tokens, self.weight.shape[0], device="cuda", dtype=torch.bfloat16)
        self.out = torch.empty_like(self.low)

    def _truth(self, whole: Tensor, first: int, columns: int) -> None:
        x, w = self.hidden.detach().double(), whole.double()
        tokens = len(x)
        self.sample = torch.arange(0, tokens, 16, device="cuda")
        self.columns = torch.cat([torch.arange(0, columns, 997, device="cuda"), self.labels[:64] % columns]).unique()
        self.logprobs, self.entropy = torch.empty(2, tokens, dtype=torch.float64, device="cuda")
        self.logits = x[self.sample] @ w[first : first + columns].t()
        lse = torch.empty_like(self.logprobs)
        for rows in torch.arange(tokens, device="cuda").split(1024):
            z = x[rows] @ w.t()
            lse[rows] = z.logsumexp(1)
            logp = z - lse[rows, None]
            self.logprobs[rows] = logp.gather(1, self.labels[rows, None])[:, 0]
            self.entropy[rows] = torch.special.entr(logp.exp()).sum(1)
        p = (x[self.sample] @ w.t() - lse[self.sample, None]).exp()
        p[torch.arange(len(self.sample)), self.labels[self.sample]] -= 1
        self.hidden_grad = p @ w / tokens
        del p
        dy = (x @ w[first + self.columns].t() - lse[:, None]).exp()
        dy -= (self.labels[:, None] == first + self.columns).double()
        self.weight_grad = dy.t() @ x / tokens

    def unit(self, name: str) -> Callable[[], Any]:
        """The bare products: "logits", "three" (logits, dX and dW) or "four" (logits twice, dX and dW)."""
        x, w = self.hidden.detach(), self.weight.detach()
        products: list[Callable[[], Any]] = [
            lambda: torch.mm(x, w.t(), out=self.out),
            lambda: torch.mm(self.low, w),
            lambda: torch.mm(self.low.t(), x),
            lambda: torch.mm(x, w.t(), out=self.out),
        ]
        chosen = products[: {"logits": 1, "three": 3, "four": 4}[name]]
        return lambda: [product() for product in chosen] and None


class Table:
    """Measures rows, and prints each when it is measured."""

    def __init__(self, problem: Problem, repeats: int, only: str) -> None:
        self.problem, self.repeats, self.only, self.rows = problem, repeats, only, []

    def add(
        self,
        what: str,
        unit: str | Callable[[], Any],
        way: Callable[[], Any],
        check: Callable[[Any], dict[str, float]],
    ) -> None:
        """Time, check and print one row."""
        if self.only not in what:
            return
        p = self.problem

        def before(name: str) -> None:
            if name == "way":
                p.main_grad.zero_()
                p.hidden.grad = p.weight.grad = p.plain_weight.grad = None

        unit_way = p.unit(unit) if isinstance(unit, str) else unit
        found = take_turns({"unit": unit_way, "way": way}, repeats=self.repeats, before=before, wait=False)
        (unit_ms, *_), (ms, peak, output) = found["unit"], found["way"]
        row = {"shape": p.name, "what": what, "ms": ms, "unit": unit if isinstance(unit, str) else "custom"}
        row |= {"unit_ms": unit_ms, "ratio": ms / unit_ms, "peak_gib": peak / GIB, **check(output)}
        self.rows.append(row)
        errors = "  ".join(f"{k} {v:.2e}" for k, v in row.items() if k.startswith("error"))
        if int(os.environ.get("RANK", "0")) == 0:
            own = unit if isinstance(unit, str) else "own"
            time = f"{ms:8.2f} ms {ms / unit_ms:6.3f}x {own:7} +{peak / GIB:5.2f} GiB"
            print(f"{p.name}  {what:52} {time}  {errors}", flush=True)


def forward_rows(table: Table) -> None:
    p = table.problem
    x, w = p.hidden.detach(), p.weight.detach()

    def logits_error(z: Tensor) -> dict[str, float]:
        return {"error_logits": relative_error(z[p.sample, : p.logits.shape[1]], p.logits)}

    def fixed(x: Tensor, w: Tensor) -> Tensor:
        return fixed_order_product(x, w, torch.empty(len(x), len(w), device="cuda"))

    table.add("bf16 logits, then .float()", "logits", lambda: (x @ w.t()).float(), logits_error)
    table.add("fp32 logits", "logits", lambda: fp32_logits(x, w), logits_error)
    table.add("fp32 logits, invariant", "logits", lambda: fixed(x, w), logits_error)
    for tokens, columns in ((len(x), len(w) // 8), (40, len(w))):
        a, b = x[:tokens], w[:columns]
        own = lambda a=a, b=b: a @ b.t()  # noqa: E731
        name = f"T={tokens} V={columns}"
        nothing = lambda _: {}  # noqa: E731
        table.add(f"fp32 logits, {name}", own, lambda a=a, b=b: fp32_logits(a, b), nothing)
        table.add(f"fp32 logits, invariant, {name}", own, lambda a=a, b=b: fixed(a, b), nothing)

    def probs_error(out: Any) -> dict[str, float]:
        error = (out.logprobs.double() - p.logprobs).abs()
        sure = p.logprobs > torch.tensor(0.999, dtype=torch.float64).log()
        return {
            "error_median": float(error.median()),
            "error_sure_max": float(error[sure].max()),
            "error_loss": relative_error(out.logprobs, p.logprobs),
            "error_entropy": relative_error(out.entropy, p.entropy),
        }

    @torch.no_grad()
    def logprobs(invariant: bool) -> Any:
        return linear_logprobs(x, w, p.labels, vocab_parallel=p.parallel, invariant=invariant)

    table.add("log-probs and entropy", "logits", lambda: logprobs(False), probs_error)
    table.add("log-probs and entropy, invariant", "logits", lambda: logprobs(True), probs_error)


def gradient_error(p: Problem) -> dict[str, float]:
    """Errors of the dX and dW that autograd and `main_grad` have now."""
    rounding = relative_error(p.hidden_grad.bfloat16(), p.hidden_grad)
    error = relative_error(p.hidden.grad[p.sample], p.hidden_grad)
    return {
        "error_dX": error,
        "error_dX_over_rounding": error / rounding,
        "error_dW": relative_error(p.main_grad[p.columns], p.weight_grad),
    }


def backward_rows(table: Table) -> None:
    p = table.problem

    def weighted(precision: Any, hidden: Tensor | None = None, invariant: bool = False) -> Tensor:
        out = weighted_cross_entropy(
            p.hidden if hidden is None else hidden, p.weight, p.labels, p.weights, vocab_parallel=p.parallel,
            grad_precision=precision, invariant=invariant,
        )  # fmt: skip
        out.total.backward()
        return out.losses

    def logprobs(backward: Any, precision: Any = "bf16", invariant: bool = False) -> Tensor:
        out = linear_logprobs(
            p.hidden, p.weight, p.labels, vocab_parallel=p.parallel, backward=backward,
            grad_precision=precision, invariant=invariant,
        )  # fmt: skip
        out.logprobs.backward(-p.weights)
        return -out.logprobs.detach()

    def check(losses: Tensor) -> dict[str, float]:
        return {"error_loss": relative_error(losses, -p.logprobs), **gradient_error(p)}

    for precision in ("bf16", "bf16x2", "bf16x3"):
        table.add(f"weighted loss, {precision}", "three", functools.partial(weighted, precision), check)
    for precision in ("bf16", "bf16x2"):
        recompute = functools.partial(logprobs, "recompute", precision)
        table.add(f"log-probs, recompute, {precision}", "four", recompute, check)
        table.add(f"log-probs, saved, {precision}", "three", functools.partial(logprobs, "saved", precision), check)
    table.add("weighted loss, bf16, invariant", "three", lambda: weighted("bf16", invariant=True), check)
    table.add("weighted loss, bf16x2, invariant", "three", lambda: weighted("bf16x2", invariant=True), check)
    table.add("log-probs, recompute, bf16, invariant", "four", lambda: logprobs("recompute", invariant=True), check)
    wide = p.hidden.detach().float().requires_grad_()

    def check_wide(_: Any) -> dict[str, float]:
        error = relative_error(wide.grad[p.sample], p.hidden_grad)
        wide.grad = None
        return {"error_dX": error, "error_dW": relative_error(p.main_grad[p.columns], p.weight_grad)}

    def weighted_wide() -> Tensor:
        wide.grad = None
        return weighted("bf16x2", wide)

    table.add("weighted loss, bf16x2, fp32 hidden", "three", weighted_wide, check_wide)


def rival_rows(table: Table) -> None:
    """Rows for other libraries, with the tensors of the other rows. The time includes adding dW to `main_grad`."""
    p = table.problem
    x, w = p.hidden, p.plain_weight

    def step(loss_of: Callable[[], Tensor]) -> Tensor:
        loss = loss_of()
        loss.backward()
        p.main_grad.add_(w.grad)
        return loss.detach()

    def check(loss: Tensor) -> dict[str, float]:
        return {"error_loss": relative_error(loss, -p.logprobs.mean()), **gradient_error(p)}

    for name, loss_of in rivals(x, w, p.labels).items():
        table.add(name, "three", functools.partial(step, loss_of), check)


def rivals(x: Tensor, w: Tensor, labels: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Functions for the mean loss, by the name of the installed library."""
    ways: dict[str, Callable[[], Tensor]] = {}
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        ways["Liger fused linear cross entropy"] = lambda: LigerFusedLinearCrossEntropyFunction.apply(x, w, labels)[0]
    except ImportError as error:
        print(f"Liger does not take part: {error}")
    try:
        from cut_cross_entropy import linear_cross_entropy as cce

        ways["CCE cce"] = lambda: cce(x, w, labels, impl="cce")
        ways["CCE torch_compile"] = lambda: cce(x, w, labels, impl="torch_compile")
    except ImportError as error:
        print(f"CCE does not take part: {error}")
    try:
        from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy

        if not dist.is_initialized():
            dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        group = dist.group.WORLD

        def megatron() -> Tensor:
            logits = (x @ w.t())[:, None]
            return vocab_parallel_cross_entropy(logits, labels[:, None], tp_group=group).mean()

        ways["megatron-core, bf16 logits"] = megatron
    except ImportError as error:
        print(f"megatron-core does not take part: {error}")
    return ways


@click.command()
@click.option("--shape", "shapes", multiple=True, default=SHAPES, show_default=True, help="tokens,hidden,vocab")
@click.option("--repeats", default=15, show_default=True)
@click.option("--rivals/--no-rivals", "with_rivals", default=True)
@click.option("--only", default="", help="Only rows whose name contains this.")
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(shapes: tuple[str, ...], repeats: int, with_rivals: bool, only: str, json_path: Path | None) -> None:
    group = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl")
        group = dist.group.WORLD
    rows: list[dict[str, Any]] = []
    for shape in shapes:
        table = Table(Problem(*map(int, shape.split(",")), group), repeats, only)
        forward_rows(table)
        backward_rows(table)
        if with_rivals and group is None:
            rival_rows(table)
        rows += table.rows
        del table
        torch.cuda.empty_cache()
    if json_path is not None and int(os.environ.get("RANK", "0")) == 0:
        machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
        result = {"command": " ".join(sys.argv), **machine, "python": platform.python_version(), "rows": rows}
        json_path.write_text(json.dumps(result, indent=1) + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
