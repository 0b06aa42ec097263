"""A small training loop around megatron-core's own parts, for tests and demonstrations.

Float16Module, DistributedDataParallel, optimizer, save and load are megatron-core's; this file only calls them in the
order in which Megatron-LM does.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from megatron_fp32.validation import check_choice, check_count, check_flag, check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How `Trainer` wraps and optimizes."""

    distributed_optimizer: bool = True
    sharding: str = "dp_reshardable"
    """How the distributed optimizer is saved: `"dp_reshardable"` or `"fully_reshardable"`."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    grad_reduce_in_fp32: bool = True

    def __post_init__(self) -> None:
        check_flag("distributed_optimizer", self.distributed_optimizer)
        check_choice("sharding", self.sharding, ("dp_reshardable", "fully_reshardable"))
        check_flag("grad_reduce_in_fp32", self.grad_reduce_in_fp32)
        for name in ("lr", "weight_decay", "clip_grad"):
            check_number(name, getattr(self, name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch."""

    tokens: Tensor
    """[b, s] int64"""
    labels: Tensor
    """[b, s] int64"""

    @classmethod
    def random(cls, vocab_size: int, *, batch: int = 2, length: int = 32, seed: int = 0) -> Batch:
        """Uniform tokens, with the next token as label."""
        for name, size in (("vocab_size", vocab_size), ("batch", batch), ("length", length)):
            check_count(name, size)
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, vocab_size, (batch, length + 1), generator=generator)
        return cls(tokens=text[:, :-1].contiguous(), labels=text[:, 1:].contiguous())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        return Batch(tokens=self.tokens.to(device), labels=self.labels.to(device))


class Trainer:
    """A wrapped model and its optimizer on this rank.

    Args:
        model: a built `GPTModel`; it is wrapped in Float16Module when its configuration says bf16 or fp16.
        config: see `TrainerConfig`.
    """

    def __init__(self, model: GPTModel, config: TrainerConfig | None = None) -> None:
        self.config = config or TrainerConfig()
        self.model = model
        mixed = model.config.bf16 or model.config.fp16
        inner = Float16Module(model.config, model) if mixed else model
        self.ddp = DistributedDataParallel(
            model.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=self.config.distributed_optimizer,
                grad_reduce_in_fp32=self.config.grad_reduce_in_fp32,
                overlap_grad_reduce=False,
            ),
            inner,
        )
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=self.config.lr,
                weight_decay=self.config.weight_decay,
                clip_grad=self.config.clip_grad,
                bf16=model.config.bf16,
                fp16=model.config.fp16,
                params_dtype=model.config.params_dtype,
                use_distributed_optimizer=self.config.distributed_optimizer,
            ),
            [self.ddp],
        )

    def backward(self, micro_batches: Sequence[Batch]) -> float:
        """Gradients of the mean loss over micro-batches, reduced over the ranks; they are left in `main_grad`."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        total = 0.0
        for batch in micro_batches:
            loss = self.loss(batch).mean() / len(micro_batches)
            self.optimizer.scale_loss(loss).backward()
            total += float(loss.detach())
        finalize_model_grads([self.ddp])
        return total

    def step(self, micro_batches: Sequence[Batch]) -> float:
        """One optimizer step; the mean loss before it."""
        loss = self.backward(micro_batches)
        self.optimizer.step()
        return loss

    def loss(self, batch: Batch) -> Tensor:
        """Per-token loss [b, s] in fp32."""
        return self._forward(batch.tokens, labels=batch.labels).float()

    def logits(self, tokens: Tensor) -> Tensor:
        """[b, s, padded vocab], gathered over the tensor-parallel ranks, without gradients."""
        with torch.no_grad():
            return self._forward(tokens, runtime_gather_output=True)

    def save(self, directory: str | Path) -> None:
        """Save model and optimizer as `torch_dist`. The directory must exist on rank 0's file system."""
        metadata = self._metadata()
        model = self.model.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, metadata=metadata)
        dist_checkpointing.save({"model": model, "optimizer": optimizer}, str(directory))

    def load(self, directory: str | Path) -> None:
        """Load model and optimizer."""
        metadata = self._metadata()
        model = self.model.sharded_state_dict(metadata=metadata)
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=True, metadata=metadata)
        loaded = dist_checkpointing.load({"model": model, "optimizer": optimizer}, str(directory))
        self.model.load_state_dict(loaded["model"])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def load_model(self, directory: str | Path, *, strict: str = "raise_unexpected") -> None:
        """Load the model alone and take the optimizer's main parameters from it."""
        load_model(self.model, directory, strict=strict)
        self.optimizer.reload_model_params()

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the inner optimizers: main parameters and their states, `step` included."""
        for index, optimizer in enumerate(getattr(self.optimizer, "chained_optimizers", [self.optimizer])):
            inner = optimizer.optimizer
            for g, group in enumerate(inner.param_groups):
                for p, param in enumerate(group["params"]):
                    name = f"{index}.{g}.{p}"
                    yield f"{name}.param", param.detach()
                    for key, value in sorted(inner.state[param].items()):
                        if isinstance(value, Tensor):
                            yield f"{name}.{key}", value

    def _forward(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(batch, length)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)
        output: Tensor = self.ddp(tokens, positions, mask, **kwargs)
        return output

    def _metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = ensure_metadata_has_dp_cp_group(
            {"distrib_optim_sharding_type": self.config.sharding, "chained_optim_avoid_prefix": True}
        )
        return metadata


def load_model(model: GPTModel, directory: str | Path, *, strict: str = "raise_unexpected") -> None:
    """Load a `torch_dist` checkpoint's tensors into a built model.

    Args:
        directory: the one with `.metadata`.
        strict: megatron-core's `StrictHandling`.
    """
    state = {"model": model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group({}))}
    model.load_state_dict(dist_checkpointing.load(state, str(directory), strict=strict)["model"])
