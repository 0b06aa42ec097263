"""A small training loop for tests and demonstrations.

It calls megatron-core's Float16Module, DistributedDataParallel, optimizer, save and load in Megatron-LM's order.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from megatron_fp32.validation import check_choice, check_count, check_flag, check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How `Trainer` wraps and optimizes a model."""

    distributed_optimizer: bool = True
    sharding: str = "dp_reshardable"
    """Format of the distributed optimizer's states: `"dp_reshardable"` or `"fully_reshardable"`."""
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    grad_reduce_in_fp32: bool = True
    bucket_size: int | None = None
    """Values in a bucket of gradients. None makes one bucket for each dtype, and more only around tied embeddings.
    megatron-core uses this on the first pipeline stage only, and only with `overlap_grad_reduce`."""
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    """Gather updated parameters in the next forward pass. Until then a rank holds old values of other ranks' shards.
    Needs `distributed_optimizer` and `overlap_grad_reduce`."""
    config_overrides: dict[Any, Any] | None = None
    """`config_overrides` of `get_megatron_optimizer`, which make separate parameter groups."""

    def __post_init__(self) -> None:
        check_flag("distributed_optimizer", self.distributed_optimizer)
        check_choice("sharding", self.sharding, ("dp_reshardable", "fully_reshardable"))
        check_flag("grad_reduce_in_fp32", self.grad_reduce_in_fp32)
        check_flag("overlap_grad_reduce", self.overlap_grad_reduce)
        check_flag("overlap_param_gather", self.overlap_param_gather)
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs distributed_optimizer=True and overlap_grad_reduce=True")
        if self.bucket_size is not None:
            check_count("bucket_size", self.bucket_size)
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
        """Random tokens, uniform over the vocabulary. The label of a token is the next token."""
        for name, size in (("vocab_size", vocab_size), ("batch", batch), ("length", length)):
            check_count(name, size)
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, vocab_size, (batch, length + 1), generator=generator)
        return cls(tokens=text[:, :-1].contiguous(), labels=text[:, 1:].contiguous())

    def to(self, device: torch.device | str) -> Batch:
        """The batch, moved to a device."""
        return Batch(tokens=self.tokens.to(device), labels=self.labels.to(device))


class Trainer:
    """The wrapped model chunks of this rank and their optimizer.

    Args:
        model: a built `GPTModel`, or the model chunks of this pipeline stage in order. They are wrapped in
            Float16Module if their configuration has bf16 or fp16.
        config: see `TrainerConfig`.
    """

    def __init__(self, model: GPTModel | Sequence[GPTModel], config: TrainerConfig | None = None) -> None:
        self.config = config or TrainerConfig()
        self.chunks: list[GPTModel] = [model] if isinstance(model, GPTModel) else list(model)
        self.model = self.chunks[0]
        self.wrapped = [self._wrap(chunk, index) for index, chunk in enumerate(self.chunks)]
        self.ddp = self.wrapped[0]
        shared = self.model.config
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=self.config.lr,
                weight_decay=self.config.weight_decay,
                clip_grad=self.config.clip_grad,
                bf16=shared.bf16,
                fp16=shared.fp16,
                params_dtype=shared.params_dtype,
                use_distributed_optimizer=self.config.distributed_optimizer,
                overlap_param_gather=self.config.overlap_param_gather,
            ),
            self.wrapped,
            self.config.config_overrides,
        )

    def _wrap(self, chunk: GPTModel, index: int) -> DistributedDataParallel:
        mixed = chunk.config.bf16 or chunk.config.fp16
        return DistributedDataParallel(
            chunk.config,
            DistributedDataParallelConfig(
                use_distributed_optimizer=self.config.distributed_optimizer,
                grad_reduce_in_fp32=self.config.grad_reduce_in_fp32,
                overlap_grad_reduce=self.config.overlap_grad_reduce,
                overlap_param_gather=self.config.overlap_param_gather,
                bucket_size=self.config.bucket_size,
            ),
            Float16Module(chunk.config, chunk) if mixed else chunk,
            # As in Megatron-LM, except with gloo, which gathers parameters of two dtypes in one call wrongly.
            disable_bucketing=index > 0 and torch.distributed.get_backend() != "gloo",
        )

    def backward(self, micro_batches: Sequence[Batch]) -> float:
        """Compute the gradients of the mean loss over micro-batches, and reduce them over the ranks into `main_grad`.

        Returns the mean loss, or 0 on pipeline stages that do not compute the loss.
        """
        for wrapped in self.wrapped:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        if self.model.config.pipeline_model_parallel_size > 1:
            total = self._pipelined_backward(micro_batches)
        else:
            total = 0.0
            for number, batch in enumerate(micro_batches, start=1):
                with contextlib.nullcontext() if number == len(micro_batches) else self.ddp.no_sync():
                    loss = self.loss(batch).mean() / len(micro_batches)
                    self.optimizer.scale_loss(loss).backward()
                total += float(loss.detach())
        finalize_model_grads(self.wrapped)
        return total

    def _pipelined_backward(self, micro_batches: Sequence[Batch]) -> float:
        """`backward` with megatron-core's pipeline schedule, which sends activations between the stages."""

        def forward_step(batches: Iterator[Batch], wrapped: Any) -> tuple[Tensor, Any]:
            batch = next(batches)
            output = self._forward(batch.tokens, labels=batch.labels, wrapped=wrapped)

            def loss_of(per_token: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                loss = per_token.float().mean()
                return loss, {"loss": loss.detach()}

            return output, loss_of

        losses = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(micro_batches) for _ in self.wrapped],
            model=self.wrapped,
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].tokens.shape[1],
            micro_batch_size=micro_batches[0].tokens.shape[0],
        )
        return sum(float(entry["loss"]) for entry in losses) / len(micro_batches)

    def step(self, micro_batches: Sequence[Batch]) -> float:
        """Make one optimizer step, and return the mean loss before the step."""
        loss = self.backward(micro_batches)
        self.optimizer.step()
        return loss

    def loss(self, batch: Batch) -> Tensor:
        """Per-token loss [b, s] in fp32."""
        return self._forward(batch.tokens, labels=batch.labels).float()

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [b, s, padded vocab], gathered over the tensor-parallel ranks, without gradients."""
        with torch.no_grad():
            return self._forward(tokens, runtime_gather_output=True)

    def save(self, directory: str | Path) -> None:
        """Save model and optimizer as `torch_dist`. The directory must exist on rank 0's file system."""
        dist_checkpointing.save(self._state(is_loading=False), str(directory))

    def load(self, directory: str | Path) -> None:
        """Load model and optimizer, in this order, as Megatron-LM does."""
        loaded = dist_checkpointing.load(self._state(is_loading=True), str(directory))
        for name, chunk in self._named_chunks():
            chunk.load_state_dict(loaded[name])
        self.optimizer.load_state_dict(loaded["optimizer"])

    def _state(self, *, is_loading: bool) -> dict[str, Any]:
        metadata = self._metadata()
        state = {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in self._named_chunks()}
        # The optimizer gets a single chunk's state without the chunk's name, as in Megatron-LM.
        model = state if len(state) > 1 else state["model"]
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        return {**state, "optimizer": optimizer}

    def _named_chunks(self) -> list[tuple[str, GPTModel]]:
        """(name, chunk) of every chunk, with Megatron-LM's names: `model`, or `model0`, `model1` and so on."""
        if len(self.chunks) == 1:
            return [("model", self.model)]
        return [(f"model{index}", chunk) for index, chunk in enumerate(self.chunks)]

    def load_model(self, directory: str | Path, *, strict: str = "raise_unexpected") -> None:
        """Load only the model, and set the optimizer's main parameters from it."""
        load_model(self.model, directory, strict=strict)
        self.optimizer.reload_model_params()

    def optimizer_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of every main parameter and every state of the inner optimizers, including `step`."""
        for index, optimizer in enumerate(getattr(self.optimizer, "chained_optimizers", [self.optimizer])):
            inner = optimizer.optimizer
            for g, group in enumerate(inner.param_groups):
                for p, param in enumerate(group["params"]):
                    name = f"{index}.{g}.{p}"
                    yield f"{name}.param", param.detach()
                    for key, value in sorted(inner.state[param].items()):
                        if isinstance(value, Tensor):
                            yield f"{name}.{key}", value

    def _forward(self, tokens: Tensor, *, wrapped: Any = None, **kwargs: Any) -> Tensor:
        batch, length = tokens.shape
        positions = torch.arange(length, device=tokens.device).expand(batch, length)
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).triu(1)
        output: Tensor = (wrapped or self.ddp)(tokens, positions, mask, **kwargs)
        return output

    def _metadata(self) -> dict[str, Any]:
        sharding = {"distrib_optim_sharding_type": self.config.sharding} if self.config.distributed_optimizer else {}
        metadata: dict[str, Any] = ensure_metadata_has_dp_cp_group({**sharding, "chained_optim_avoid_prefix": True})
        return metadata


def load_model(model: GPTModel, directory: str | Path, *, strict: str = "raise_unexpected") -> None:
    """Load the tensors of a `torch_dist` checkpoint into a built model.

    Args:
        model: the model, not wrapped.
        directory: the directory with `.metadata`.
        strict: a value of megatron-core's `StrictHandling`.
    """
    state = {"model": model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group({}))}
    model.load_state_dict(dist_checkpointing.load(state, str(directory), strict=strict)["model"])
