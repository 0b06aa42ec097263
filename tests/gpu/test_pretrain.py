"""Megatron's own `pretrain()` from an import, under Transformer Engine: all families at once, a process or two each."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from tests.checkpoint.support import stored_tensors
from tests.families import Case, case

pytestmark = pytest.mark.gpu

PRETRAIN = Path(__file__).parents[2] / "examples" / "pretrain.py"

# What Transformer Engine's and flash-linear-attention's kernels take.
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 8, "moe_intermediate_size": 64}
HYBRID: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
SHARED: dict[str, Any] = {**EXPERTS, "shared_expert_intermediate_size": 64}

FIELDS = {
    "Llama without scaling": {},
    "Qwen3, tied": {},
    "Qwen3-MoE": EXPERTS,
    "Qwen3-MoE, a dense layer": EXPERTS,
    "Qwen3-Next": {**HYBRID, **SHARED},
    "Qwen3.5": HYBRID,
    "Qwen3.5-MoE": {**HYBRID, **SHARED},
}
TIED = dataclasses.replace(case("Qwen3.5, tied"), mtp=True, fields={**case("Qwen3.5, tied").fields, **SIZES, **HYBRID})
CASES = [
    *(dataclasses.replace(case(name), fields={**case(name).fields, **SIZES, **own}) for name, own in FIELDS.items()),
    TIED,
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a run left."""

    work: Path
    log: str


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Run]]]:
    """All runs, at once: each takes most of its time to start."""
    with ThreadPoolExecutor(len(CASES)) as pool:
        yield {case.name: pool.submit(pretrain, case, tmp_path_factory.mktemp("pretrain")) for case in CASES}


def pretrain(case: Case, work: Path) -> Run:
    """Two iterations with a learning rate of 0, from an import, saved."""
    hf = case.write(work / "hf")
    import_checkpoint(hf, work / "imported")
    gpus = min(torch.cuda.device_count(), 2)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    flags = [
        *(parallel(case) if gpus == 2 else []), *(["--mtp-num-layers", "1"] if case.mtp else []),
        "--load", str(work / "imported"), "--finetune", "--use-checkpoint-args", "--dist-ckpt-strictness", "raise_all",
        "--save", str(work / "run"), "--save-interval", "2", "--train-iters", "2", "--lr", "0", "--log-interval", "1",
        "--bf16", "--use-distributed-optimizer", "--mock-data", "--num-workers", "0", "--seq-length", "64",
        "--max-position-embeddings", "64", "--micro-batch-size", "1", "--global-batch-size", "2", "--eval-iters", "0",
        "--eval-interval", "1000", "--no-gradient-accumulation-fusion",
    ]  # fmt: skip
    env = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    log = work / "log"
    with log.open("w") as out:
        command = [*launch, str(PRETRAIN), "--hf-dir", str(hf), *flags]
        ended = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=env, check=False)
    text = log.read_text()
    assert ended.returncode == 0, text[-4000:]
    return Run(work=work, log=text)


def parallel(case: Case) -> list[str]:
    if case is TIED:
        return ["--pipeline-model-parallel-size", "2", "--decoder-first-pipeline-num-layers", "2"]
    experts = "num_experts" in case.fields
    return [
        "--tensor-model-parallel-size", "2", "--sequence-parallel",
        *(["--expert-model-parallel-size", "2", "--expert-tensor-parallel-size", "1"] if experts else []),
    ]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_run_from_an_import_saves_the_same_bytes(runs: dict[str, Run], case: Case) -> None:
    run = runs[case.name].result()
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", run.log)]
    assert len(losses) == 2
    assert all(0 < loss < 1000 for loss in losses)
    export_checkpoint(run.work / "run", run.work / "exported", source=run.work / "imported")
    assert stored_tensors(run.work / "exported") == stored_tensors(run.work / "hf")
