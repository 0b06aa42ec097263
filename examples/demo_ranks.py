"""Functions that `demo.py` runs on its tensor-parallel ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_fp32 import Fp32Config, install_optimizer_repairs, model_provider
from megatron_fp32.checkpoint.formats.digests import digest
from megatron_fp32.checkpoint.sidecar import find_sidecar
from megatron_fp32.models.live import LiveTensors
from megatron_fp32.models.provider import cpu_overrides, read_hf_config
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.training import Batch, Trainer, TrainerConfig
from megatron_fp32.weights.model_map import map_trained_model
from megatron_fp32.weights.restore import Restorer

TENSOR_PARALLEL = 2
KEPT = ("A_log", "out_norm.weight")

Station = dict[str, dict[str, Any]]


def build_trainer(hf_dir: Path, *, bf16: bool, fp32_head: bool = True, seed: int = 1234) -> Trainer:
    """Build and wrap the provider's model. Every rank must pass equal arguments."""
    torch.manual_seed(seed)
    provider = model_provider(
        hf_dir,
        fp32=Fp32Config(logits=fp32_head),
        bf16=bf16,
        tensor_model_parallel_size=TENSOR_PARALLEL,
        **cpu_overrides(),
    )
    return Trainer(provider(), TrainerConfig(lr=2e-3))


def wrapping_stations(hf_dir: Path, megatron_dir: Path) -> dict[str, Station]:
    """The kept parameters after build, Float16Module, DDP and load."""
    from megatron.core.transformer.module import Float16Module

    with model_parallel(tensor=TENSOR_PARALLEL):
        torch.manual_seed(7)
        model = model_provider(hf_dir, bf16=True, tensor_model_parallel_size=TENSOR_PARALLEL, **cpu_overrides())()
        stations = {"build": describe_kept(model, megatron_dir)}
        Float16Module(model.config, model)
        stations["Float16Module"] = describe_kept(model, megatron_dir)
        trainer = Trainer(model)
        stations["DDP"] = describe_kept(model, megatron_dir)
        trainer.load_model(megatron_dir / "release")
        stations["load"] = describe_kept(model, megatron_dir)
        return stations


def head_errors(hf_dir: Path, megatron_dir: Path, batch: Batch) -> dict[str, Any]:
    """Errors of both output layers against float64, for equal bf16 hidden states."""
    with model_parallel(tensor=TENSOR_PARALLEL):
        vocab = read_hf_config(hf_dir).vocab_size
        kept = build_trainer(hf_dir, bf16=True)
        stock = build_trainer(hf_dir, bf16=True, fp32_head=False)
        for trainer in (kept, stock):
            trainer.load_model(megatron_dir / "release")
        seen: list[Tensor] = []
        handle = kept.model.output_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with torch.no_grad():
            logits = kept.logits(batch.tokens)[..., :vocab]
            handle.remove()
            weight = output_weight(kept)
            truth = log_probs(seen[0].double() @ gather(weight, 0)[:vocab].double().t(), batch, sequence_first=True)
            passed = weight if kept.model.share_embeddings_and_output_weights else None
            stock_logits, _ = stock.model.output_layer(seen[0], weight=passed, runtime_gather_output=True)
        errors = {
            "fp32": rms(log_probs(logits, batch) - truth),
            "stock": rms(log_probs(stock_logits[..., :vocab].float(), batch, sequence_first=True) - truth),
        }
        return {**errors, "logits_std": float(logits.std()), "calls": count_calls(kept.model)}


def end_to_end(hf_dir: Path, megatron_dir: Path, batch: Batch, *, bf16: bool, fp32_head: bool) -> Tensor:
    """Log-probs of the labels [b, s] through the whole model."""
    with model_parallel(tensor=TENSOR_PARALLEL):
        trainer = build_trainer(hf_dir, bf16=bf16, fp32_head=fp32_head)
        trainer.load_model(megatron_dir / "release")
        logits = trainer.logits(batch.tokens)[..., : read_hf_config(hf_dir).vocab_size]
        return log_probs(logits.float(), batch)


def train(
    hf_dir: Path, megatron_dir: Path, batches: list[Batch], *, steps: int, start: Path | None, save: Path | None
) -> dict[str, Any]:
    """Train `steps` steps from the import or from `start`, and save.

    Returns:
        Losses, digests of this rank's parameters and optimizer tensors, and the kept parameters.
    """
    with model_parallel(tensor=TENSOR_PARALLEL), install_optimizer_repairs() as repairs:
        trainer = build_trainer(hf_dir, bf16=True)
        if start is None:
            trainer.load_model(megatron_dir / "release")
        else:
            trainer.load(start)
        losses, stations = [], {}
        for step in range(steps):
            losses.append(trainer.step(batches))
            if step == 0:
                stations["a step"] = describe_kept(trainer.model, megatron_dir)
        stations["end"] = describe_kept(trainer.model, megatron_dir)
        if save is not None:
            trainer.save(save)
        return {
            "losses": losses,
            "parameters": digests(trainer.model.named_parameters()),
            "optimizer": digests(trainer.optimizer_tensors()),
            "stations": stations,
            "calls": count_calls(trainer.model),
            "repairs": list(repairs.installed),
        }


def load_and_save(hf_dir: Path, megatron_dir: Path, save: Path) -> None:
    """Load the import into a wrapped bf16 model and save it again without a step."""
    with model_parallel(tensor=TENSOR_PARALLEL), install_optimizer_repairs():
        trainer = build_trainer(hf_dir, bf16=True)
        trainer.load_model(megatron_dir / "release")
        trainer.save(save)


def describe_kept(model: torch.nn.Module, megatron_dir: Path) -> Station:
    """The kept parameters of a built model, gathered, as Hugging Face stores them."""
    parameters = dict(model.named_parameters())
    sidecar, live = find_sidecar(megatron_dir), LiveTensors(model, group=dist.group.WORLD)
    restorer = Restorer(live, sidecar.originals())
    found: dict[str, list[Tensor]] = {name: [] for name in KEPT}
    dtypes: dict[str, set[torch.dtype]] = {name: set() for name in KEPT}
    for mapping in map_trained_model(sidecar.hf_config, sidecar.infos, live.tensors).mappings:
        name = mapping.megatron[0].name
        kind = next((kind for kind in KEPT if name.endswith(kind)), None)
        if kind is not None:
            if kind != "A_log":
                check_replicated(parameters[name].detach())
            found[kind] += restorer.restore(mapping).hf
            dtypes[kind].add(live.tensors[name].dtype)
    return {kind: describe(tensors, dtypes[kind]) for kind, tensors in found.items()}


def describe(tensors: list[Tensor], dtypes: set[torch.dtype] | None = None) -> dict[str, Any]:
    """Dtype, one digest of all values, and the fraction of values that are not exact in bf16."""
    values = torch.cat([t.reshape(-1).float() for t in tensors])
    dtypes = dtypes or {t.dtype for t in tensors}
    return {
        "dtype": "/".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        "digest": digest(values)[:16],
        "beyond_bf16": float((values.bfloat16().float() != values).double().mean()),
    }


def log_probs(logits: Tensor, batch: Batch, *, sequence_first: bool = False) -> Tensor:
    """Log-probs of the labels [b, s] from logits [b, s, v], or with `sequence_first` from logits [s, b, v]."""
    if sequence_first:
        logits = logits.transpose(0, 1)
    return logits.log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)


def gather(value: Tensor, dim: int) -> Tensor:
    """Gather a tensor that is sharded over the tensor-parallel ranks along `dim`."""
    parts = [torch.empty_like(value) for _ in range(TENSOR_PARALLEL)]
    dist.all_gather(parts, value.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(parts, dim)


def check_replicated(value: Tensor) -> None:
    """Raise unless all ranks hold equal values."""
    first, second = gather(value, 0).chunk(TENSOR_PARALLEL)
    if not torch.equal(first, second):
        raise RuntimeError("a replicated parameter differs between the tensor-parallel ranks")


def output_weight(trainer: Trainer) -> Tensor:
    """This rank's rows of the output layer's weight, tied or not."""
    if trainer.model.share_embeddings_and_output_weights:
        return trainer.model.shared_embedding_or_output_weight().detach()
    return trainer.model.output_layer.weight.detach()


def count_calls(model: torch.nn.Module) -> dict[str, int]:
    """How often the fp32 output layer, and gated delta nets with fp32 parameters, ran on this rank."""
    layers = [module for module in model.modules() if hasattr(module, "fp32_calls")]
    return {
        "output_layer": sum(m.fp32_calls for m in layers if m is model.output_layer),
        "gated_delta_net": sum(m.fp32_calls for m in layers if m is not model.output_layer),
    }


def digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """Digest of each tensor by name."""
    return {name: digest(tensor) for name, tensor in tensors}


def rms(values: Tensor) -> float:
    """Root of the mean square."""
    return math.sqrt(float(values.double().square().mean()))
