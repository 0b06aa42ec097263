"""What the stand-ins share: the model that they build, and a record of what they did with a recipe."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import torch

from megatron_fp32.optimizer.native_fp32 import pending_repairs
from megatron_fp32.testing.training import Batch, Trainer
from tests.support import stock_model

Hook = Callable[[list[Any]], list[Any]]
Modules = dict[str, dict[str, Any] | types.ModuleType]
BATCH = Batch.random(120, batch=2, length=16)


@dataclasses.dataclass
class Run:
    """What a program did with a recipe."""

    flags: list[str] = dataclasses.field(default_factory=list)
    """The command line of the script."""
    rounds_after_wrapping: bool = False
    """The program rounds `A_log` to bf16 behind the recipe's back: its check must see that."""
    loaded_into: list[torch.dtype] = dataclasses.field(default_factory=list)
    """The dtype of `A_log` each time that weights were loaded."""
    trainers: list[Trainer] = dataclasses.field(default_factory=list)
    """One for each wrapped model that has an optimizer."""
    pending: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    """The optimizer repairs that were missing when an optimizer was built."""
    checkpoint: types.SimpleNamespace = dataclasses.field(default_factory=types.SimpleNamespace)
    steps: int = 0

    def load_weights(self, chunks: list[Any]) -> list[Any]:
        self.loaded_into += [chunk.decoder.layers[0].self_attention.A_log.dtype for chunk in chunks]
        return chunks

    def train(self, chunks: list[Any]) -> Trainer:
        """Wrap the chunks and build their optimizer."""
        trainer = Trainer(chunks)
        self.pending.append(pending_repairs(trainer.optimizer))
        if self.rounds_after_wrapping:
            attention = trainer.model.decoder.layers[0].self_attention
            attention.A_log.data = attention.A_log.data.bfloat16()
        self.trainers.append(trainer)
        return trainer

    def step(self, trainer: Trainer, forward_step: Callable[..., Any] | None = None) -> None:
        if forward_step is not None:
            losses, loss_of = forward_step(iter([BATCH]), trainer.wrapped[0])
            assert torch.isfinite(loss_of(losses)[0])
        trainer.step([BATCH])
        self.steps += 1


def built(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    return stock_model(stage={"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage})


def as_modules(contents: Modules) -> dict[str, types.ModuleType]:
    """The modules and their packages, by name. `megatron` itself is megatron-core's."""
    made = {name: module for name, module in contents.items() if isinstance(module, types.ModuleType)}
    for name, names in contents.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            if package != "megatron":
                made.setdefault(package, types.ModuleType(package))
        if isinstance(names, dict):
            vars(made[name]).update(names)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent in made:
            setattr(made[parent], child, module)
    return made
