"""Every state of every optimizer as whole tensors, by the names of the model's checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_fp32.testing.training import Trainer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What one rank has of one state. Numbers that it does not have are NaN."""

    name: str
    whole: tuple[int, ...]
    offset: tuple[int, ...]
    data: torch.Tensor


def pieces(trained: Trainer) -> list[Piece]:
    """This rank's part of every state, read from the live optimizers."""
    found = []
    entries: dict[int, Any] = {}
    for chunk in trained.chunks:
        entries |= {id(entry.data): entry for entry in nested_values(chunk.sharded_state_dict())}
    for param, states in _states(trained):
        for key, state in states.items():
            entry = entries[id(param)]
            if isinstance(entry, ShardedTensorFactory):
                built = dataclasses.replace(entry, data=state).build()
            else:
                built = [dataclasses.replace(entry, data=state, dtype=state.dtype)]
            for piece in flatten(built):
                assert isinstance(piece, ShardedTensor)
                # Leading axes that the local tensor does not have are of length one.
                data = piece.data.reshape((1,) * piece.prepend_axis_num + tuple(piece.data.shape)).clone()
                found.append(
                    Piece(name=f"{key} {piece.key}", whole=piece.global_shape, offset=piece.global_offset, data=data)
                )
    return found


def flatten(pieces: Any) -> Iterator[Any]:
    """The ShardedTensors in what a factory builds."""
    for piece in pieces.values() if isinstance(pieces, dict) else pieces:
        if isinstance(piece, (list, dict)):
            yield from flatten(piece)
        else:
            yield piece


def whole(ranks: list[list[Piece]]) -> dict[str, torch.Tensor]:
    """The states of all ranks put together. Ranks that have the same number agree on it, and none is missing."""
    states: dict[str, torch.Tensor] = {}
    for piece in (piece for rank in ranks for piece in rank):
        state = states.setdefault(piece.name, torch.full(piece.whole, torch.nan))
        assert tuple(state.shape) == tuple(piece.whole), piece.name
        window = state[tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.data.shape, strict=True))]
        mine, known = ~piece.data.isnan(), ~window.isnan()
        assert torch.equal(window[mine & known], piece.data[mine & known]), f"ranks differ: {piece.name}"
        window[mine] = piece.data[mine]
    for name, state in states.items():
        assert not state.isnan().any(), f"nobody has all of {name}"
    return states


def _states(trained: Trainer) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
    for optimizer in getattr(trained.optimizer, "chained_optimizers", [trained.optimizer]):
        if isinstance(optimizer, DistributedOptimizer):
            yield from _of_distributed(optimizer)
        else:
            for model, main in _float16_pairs(optimizer):
                yield model, {"param": main.detach(), **_moments(optimizer.optimizer.state[main])}


def _of_distributed(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, dict[str, torch.Tensor]]]:
    for model in optimizer.model_param_group_index_map:
        place = optimizer._get_model_param_range_map(model)["param"]
        states = {}
        for key, shard in optimizer._get_main_param_and_optimizer_states(model).items():
            if shard.dim() == 1:
                states[key] = torch.full((model.numel(),), torch.nan)
                states[key][place.start : place.end] = shard.detach()
                states[key] = states[key].reshape(model.shape)
        yield model, states


def _float16_pairs(optimizer: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    for models, mains in zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True):
        yield from zip(models, mains, strict=True)
    for natives in optimizer.fp32_from_fp32_groups:
        for native in natives:
            yield native, native


def _moments(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if value.dim() > 0}
