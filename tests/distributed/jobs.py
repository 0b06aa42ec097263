"""Functions that the tests of this folder run on ranks."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_fp32.checkpoint.formats.digests import digest
from megatron_fp32.config import Fp32Config
from megatron_fp32.models.provider import build_model, cpu_overrides, transformer_config
from megatron_fp32.optimizer import native_fp32
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.training import Batch, Trainer, TrainerConfig
from tests.distributed.optimizer_states import Piece, flatten, pieces
from tests.qwen3_5 import tiny_qwen3_5

LENGTH = 16


Parallel = dict[str, int]
"""Arguments of `model_parallel`."""


def trainer(
    config: TrainerConfig,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    virtual: int | None = None,
    expert: int = 1,
    fp32: Fp32Config | None = None,
    tied: bool = False,
    layers: int = 2,
    experts: bool = False,
    **overrides: Any,
) -> Trainer:
    """This rank's chunks of a tiny model in bf16, wrapped, with the same start for every call.

    Args:
        layers: how many, of both kinds in turn.
        experts: a mixture of four instead of a dense MLP.
    """
    moe = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    model = tiny_qwen3_5(
        tie_word_embeddings=tied,
        layer_types=("linear_attention", "full_attention") * (layers // 2),
        **(moe if experts else {}),
    )
    torch.manual_seed(3)
    settings = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, **overrides}
    shared = transformer_config(
        model,
        **cpu_overrides(),
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        expert_model_parallel_size=expert,
        **settings,
    )
    chunks = []
    for stage in range(virtual or 1):
        stage_of = stage if virtual else None
        chunks.append(
            build_model(
                model,
                shared,
                fp32,
                vocab_divisible_by=4,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage_of),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage_of),
                vp_stage=stage_of,
            )
        )
    return Trainer(chunks, config)


def batches(count: int = 2) -> list[Batch]:
    """Micro-batches, the same on every rank."""
    return [Batch.random(120, length=LENGTH, seed=seed) for seed in range(count)]


def state_of(trained: Trainer) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of this rank's parameters and of every tensor of its optimizer."""
    chunks = enumerate(trained.chunks)
    parameters = {f"{index} {name}": digest(p) for index, chunk in chunks for name, p in chunk.named_parameters()}
    return parameters, {name: digest(tensor) for name, tensor in trained.optimizer_tensors()}


def straight(config: TrainerConfig, parallel: Parallel, steps: int, overrides: dict[str, Any]) -> Any:
    """Train without interruption; losses and state."""
    with model_parallel(**parallel), native_fp32.install_optimizer_repairs():
        trained = trainer(config, **parallel, **overrides)
        losses = [trained.step(batches()) for _ in range(steps)]
        return losses, state_of(trained)


def train_and_save(
    config: TrainerConfig,
    parallel: Parallel,
    steps: int,
    directory: Path,
    without: str | None,
    overrides: dict[str, Any],
) -> list[Piece]:
    """Train and save, with every repair or with all but one; this rank's states."""
    with model_parallel(**parallel), repairs(without):
        trained = trainer(config, **parallel, **overrides)
        for _ in range(steps):
            trained.step(batches())
        trained.save(directory)
        return pieces(trained)


def resume(
    config: TrainerConfig,
    parallel: Parallel,
    steps: int,
    directory: Path,
    without: str | None,
    overrides: dict[str, Any],
) -> Any:
    """Load and go on; losses and state."""
    with model_parallel(**parallel), repairs(without):
        trained = loaded(config, parallel, directory, overrides)
        losses = [trained.step(batches()) for _ in range(steps)]
        return losses, state_of(trained)


def load_states(
    config: TrainerConfig, parallel: Parallel, directory: Path, without: str | None, overrides: dict[str, Any]
) -> tuple[list[Piece], dict[str, torch.Tensor]]:
    """Load; this rank's states, and its native-fp32 parameters by the names of its first chunk."""
    with model_parallel(**parallel), repairs(without):
        trained = loaded(config, parallel, directory, overrides)
        native = {n: p.detach().clone() for n, p in trained.model.named_parameters() if p.dtype == torch.float32}
        return pieces(trained), native


def load_model_alone(config: TrainerConfig, directory: Path, overrides: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Load a checkpoint of model and optimizer without the optimizer, on one rank; the model's parameters."""
    with model_parallel(), native_fp32.install_optimizer_repairs():
        trained = trainer(config, **overrides)
        trained.load_model(directory, strict="log_unexpected")
        return {name: parameter.detach().clone() for name, parameter in trained.model.named_parameters()}


def loaded(config: TrainerConfig, parallel: Parallel, directory: Path, overrides: dict[str, Any]) -> Trainer:
    """A new model and its optimizer, loaded."""
    trained = trainer(config, **parallel, **overrides)
    with torch.no_grad():
        for chunk in trained.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(7.0)  # what is not loaded shows
    trained.load(directory)
    return trained


@contextlib.contextmanager
def repairs(without: str | None) -> Iterator[None]:
    """Every optimizer repair but the one named `without`."""
    with contextlib.ExitStack() as stack:
        for repair, install in native_fp32._repairs():
            assert repair.needed, repair.name
            if repair.name != without:
                stack.enter_context(install())
        yield


def gradients(tensor: int, sequence_parallel: bool, fp32: Fp32Config) -> dict[str, torch.Tensor]:
    """Gradients of the kept parameters, whole, after three micro-batches in an fp32 body."""
    import torch.distributed as dist

    with model_parallel(tensor=tensor):
        trained = trainer(
            TrainerConfig(distributed_optimizer=False),
            tensor=tensor,
            fp32=fp32,
            bf16=False,
            params_dtype=torch.float32,
            sequence_parallel=sequence_parallel,
        )
        fill_alike(trained, tensor)
        trained.backward(batches(3))
        group = parallel_state.get_tensor_model_parallel_group()
        whole = {}
        for name, parameter in trained.model.named_parameters():
            if name.endswith(("A_log", "out_norm.weight")):
                parts = [torch.empty_like(parameter.main_grad) for _ in range(tensor)]
                dist.all_gather(parts, parameter.main_grad.contiguous(), group=group)
                whole[name] = torch.cat(parts) if name.endswith("A_log") else torch.stack(parts)
        return whole


def tied_embedding_gradient(tensor: int, fp32: Fp32Config) -> torch.Tensor:
    """The whole gradient of a tied embedding, which the input and the output layer both add to."""
    import torch.distributed as dist

    with model_parallel(tensor=tensor):
        trained = trainer(
            TrainerConfig(distributed_optimizer=False),
            tensor=tensor,
            fp32=fp32,
            tied=True,
            bf16=False,
            params_dtype=torch.float32,
        )
        fill_alike(trained, tensor)
        trained.backward(batches(3))
        grad = trained.model.embedding.word_embeddings.weight.main_grad.contiguous()
        parts = [torch.empty_like(grad) for _ in range(tensor)]
        dist.all_gather(parts, grad, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(parts)


def fill_alike(trained: Trainer, tensor: int) -> None:
    """Give every parameter the values of the same whole tensor, whatever the tensor-parallel size."""
    state = trained.model.sharded_state_dict()
    generator = torch.Generator()
    for key, entry in sorted(state.items()):
        data = getattr(entry, "data", None)
        if not isinstance(data, torch.Tensor) or not data.is_floating_point():
            continue
        sharded = entry.build() if hasattr(entry, "build") else [entry]
        for piece in flatten(sharded):
            seed = zlib.crc32(piece.key.encode())
            whole = torch.randn(piece.global_shape, generator=generator.manual_seed(seed)) * 0.1
            if key.endswith("A_log"):
                whole = whole.exp()
            window = tuple(slice(o, o + s) for o, s in zip(piece.global_offset, piece.local_shape, strict=True))
            with torch.no_grad():
                piece.data.copy_(whole[window])
