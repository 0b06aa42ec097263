"""The tensors of a Megatron model in memory, sharded over the ranks of a process group, as a `TensorSource`.

With the sidecar of the import, you get the Hugging Face tensors of a model that is being trained:

    live = LiveTensors(chunks, group=torch.distributed.group.WORLD)
    model_map = map_trained_model(sidecar.hf_config, sidecar.infos, live.tensors)
    restorer = Restorer(live, sidecar.originals())
    for mapping in model_map.mappings:
        tensors = restorer.restore(mapping).hf

Keys, shards and replicas come from megatron-core's `sharded_state_dict` (dist_checkpointing/mapping.py), so a live
model has the tensors that its checkpoint would have.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_fp32.errors import listing
from megatron_fp32.weights.spec import Shape, TensorSpec
from megatron_fp32.weights.tensors import TensorInfo


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of a tensor's values, which one rank holds."""

    name: str
    """Key of the whole tensor."""
    offset: Shape
    """Where the box begins in the whole tensor."""
    shape: Shape
    """Shape of the box, with the axes of the whole tensor."""
    info: TensorInfo
    """Dtype and shape of the whole tensor."""

    def has(self, index: Shape) -> bool:
        """Whether the box has values of element `index` of the tensor."""
        return all(start <= at < start + size for at, start, size in zip(index, self.offset, self.shape, strict=False))


def sharded_tensors(chunks: nn.Module | Sequence[nn.Module]) -> list[ShardedTensor]:
    """Every `ShardedTensor` of this rank's model chunks, with replicas and after megatron-core's factories.

    Args:
        chunks: the model, or the chunks of a virtual pipeline stage; bare, or in wrappers such as
            DistributedDataParallel.
    """
    if isinstance(chunks, nn.Module):
        chunks = [chunks]
    metadata = ensure_metadata_has_dp_cp_group({})
    state = {str(at): unwrap_model(chunk).sharded_state_dict(metadata=metadata) for at, chunk in enumerate(chunks)}
    apply_factories(state)
    return [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]


class LiveTensors:
    """A `TensorSource` over a model in the memory of the ranks of a process group.

    The constructor and `read` communicate: every rank of the group must call them in one order and with equal names.
    `read` returns the values at the moment of the call, so two reads with an optimizer step in between differ. Values
    are read through views of the parameters, which stay valid as long as the parameters keep their storage.

    Args:
        chunks: the model chunks of this rank, wrapped or not.
        group: all ranks that hold the model together, with replicas; None for a model on one rank.

    Raises:
        ValueError: when the main replicas on the ranks do not hold every value of a tensor exactly once.
    """

    def __init__(self, chunks: nn.Module | Sequence[nn.Module], *, group: dist.ProcessGroup | None) -> None:
        self._chunks, self._group = chunks, group
        self._rank = 0 if group is None else dist.get_rank(group)
        entries = sharded_tensors(chunks)
        self._own = _own_pieces(entries)
        self._addresses = _addresses(chunks)
        self.generation = 0
        """Grows when `refresh` finds tensors at other addresses: views of them are then no longer the model's."""
        # A data-parallel replica has no piece that others read, but has a device.
        self.device = entries[0].data.device if entries else torch.device("cpu")
        """Of the tensors that `read` and `gather` return."""
        pieces = [piece for piece, _ in self._own]
        everyone: list[list[Piece]] = [pieces]
        if group is not None:
            everyone = [[] for _ in range(dist.get_world_size(group))]
            dist.all_gather_object(everyone, pieces, group=group)
        self._places: dict[str, list[tuple[int, int, Piece]]] = {}
        for rank, of_rank in enumerate(everyone):
            for at, piece in enumerate(of_rank):
                self._places.setdefault(piece.name, []).append((rank, at, piece))
        self.tensors: Mapping[str, TensorInfo] = {name: found[0][2].info for name, found in self._places.items()}
        """Every tensor of the model, with its global shape, which includes padding rows of the vocabulary."""
        self._elements: dict[tuple[str, int], dict[Shape, list[tuple[int, int, Piece]]]] = {}
        self._check_complete({entry.key for entry in entries})

    def holds(self, spec: TensorSpec) -> bool:
        """Whether this rank sends values of a tensor, or of an element of a stack; see `ModelMap.subset`."""
        return any(rank == self._rank and piece.has(spec.index) for rank, _, piece in self._places.get(spec.name, ()))

    def storages(self) -> frozenset[int]:
        """Addresses of the storages that this rank's tensors lie in."""
        return frozenset(values.untyped_storage().data_ptr() for _, values in self._own)

    def refresh(self) -> None:
        """Look up the parameters again, because their storage may have moved, for example by an offloading optimizer.

        Raises:
            ValueError: when the tensors of this rank have changed since the constructor.
        """
        addresses = _addresses(self._chunks)
        if addresses == self._addresses:
            return
        own = _own_pieces(sharded_tensors(self._chunks))
        if [piece for piece, _ in own] != [piece for piece, _ in self._own]:
            raise ValueError("tensors, shapes or dtypes of the model have changed since LiveTensors was made")
        self._own, self._addresses = own, addresses
        self.generation += 1

    def read(self, name: str, index: tuple[int, ...] = ()) -> Tensor:
        """A whole tensor, or one element of a stack, on every rank of the group.

        Without a group, the result may be a view of the parameter: do not change it.
        """
        places = list(self._boxes(name, index))
        if self._group is None and len(places) == 1:
            return self._inside(places[0][1], index)
        whole = self._empty(name, index)
        for rank, at, box in places:
            if rank == self._rank:
                whole[box] = self._inside(at, index)
            if self._group is not None:
                # The box of a whole tensor is rarely contiguous.
                values = whole[box].contiguous()
                dist.broadcast(_as_bytes(values), group=self._group, group_src=rank)
                whole[box] = values
        return whole

    def gather(self, name: str, index: tuple[int, ...] = (), *, to: int) -> Tensor | None:
        """Gather a whole tensor, or one element of a stack, on one rank. The result is None on the other ranks.

        Where that rank has all of it, the result is a view of the parameter: do not change it.

        The ranks with values send them to that rank, point to point. Every rank of the group must call this in one
        order and with equal arguments.

        Args:
            name: a key of `tensors`.
            index: see `read`.
            to: the rank in the group that gets the tensor.
        """
        if self._group is None:
            return self.read(name, index)
        boxes = list(self._boxes(name, index))
        if all(rank == to for rank, _, _ in boxes):
            if self._rank != to:
                return None
            if (view := self._view(name, index, boxes)) is not None:
                return view
        whole, buffers = None, {}
        if self._rank == to:
            # Before the first message: a rank that runs out of memory in between would leave messages over.
            whole = self._empty(name, index)
            foreign = [box for rank, _, box in boxes if rank != to]
            buffers = {whole[box].shape: torch.empty_like(whole[box]).contiguous() for box in foreign}
        for rank, at, box in boxes:
            if rank == self._rank and whole is not None:
                whole[box] = self._inside(at, index)
            elif rank == self._rank:
                dist.send(_as_bytes(self._inside(at, index).contiguous()), group=self._group, group_dst=to)
            elif whole is not None:
                values = buffers[whole[box].shape]
                dist.recv(_as_bytes(values), group=self._group, group_src=rank)
                whole[box] = values
        return whole

    def _boxes(self, name: str, index: Shape) -> Iterator[tuple[int, int, tuple[slice, ...]]]:
        """(rank, which of its pieces, place in the element) of every piece that has values of an element."""
        for rank, at, piece in self._holders(name, index):
            if piece.has(index):
                sides = zip(piece.offset[len(index) :], piece.shape[len(index) :], strict=True)
                yield rank, at, tuple(slice(start, start + size) for start, size in sides)

    def _holders(self, name: str, index: Shape) -> list[tuple[int, int, Piece]]:
        """The pieces that may have values of an element: a stack of experts has thousands, each with one element."""
        places, axes = self._places[name], len(index)
        if axes == 0:
            return places
        if (name, axes) not in self._elements:
            found = self._elements.setdefault((name, axes), {})
            for place in places:
                lead = zip(place[2].offset[:axes], place[2].shape[:axes], strict=True)
                for element in itertools.product(*(range(start, start + size) for start, size in lead)):
                    found.setdefault(element, []).append(place)
        return self._elements[name, axes].get(index, [])

    def _view(self, name: str, index: Shape, boxes: Sequence[tuple[int, int, tuple[slice, ...]]]) -> Tensor | None:
        """The element, if its boxes lie one behind the other in memory, as gate and up of a parameter do."""
        ordered = sorted(boxes, key=lambda box: [side.start for side in box[2]])
        first, *others = (self._inside(at, index) for _, at, _ in ordered)
        if not others:
            return first
        shape = self.tensors[name].shape[len(index) :]
        storage, end = first.untyped_storage().data_ptr(), first.data_ptr()
        for values in (first, *others):
            together = values.untyped_storage().data_ptr() == storage and values.data_ptr() == end
            if not together or not values.is_contiguous() or values.shape[1:] != shape[1:]:
                return None
            end += values.nbytes
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return first.as_strided(shape, strides, first.storage_offset())

    def _empty(self, name: str, index: Shape) -> Tensor:
        info = self.tensors[name]
        return torch.empty(info.shape[len(index) :], dtype=info.dtype, device=self.device)

    def _inside(self, which: int, index: Shape) -> Tensor:
        """The values of element `index` in piece `which` of this rank."""
        piece, values = self._own[which]
        return values.detach().view(piece.shape)[
            tuple(i - start for i, start in zip(index, piece.offset, strict=False))
        ]

    def _check_complete(self, present: set[str]) -> None:
        wrong = [f"{name} (held by no rank of the group)" for name in sorted(present - self.tensors.keys())]
        for name, places in self._places.items():
            held, expected = sum(math.prod(piece.shape) for _, _, piece in places), math.prod(self.tensors[name].shape)
            if held != expected:
                wrong.append(f"{name} ({held} of {expected} values)")
        if wrong:
            raise ValueError(
                f"the ranks of the group do not hold every value of the model exactly once: {listing(wrong)}. Pass the "
                "group of all ranks that hold the model"
            )


def _piece_of(entry: ShardedTensor) -> Piece:
    lead = (1,) * entry.prepend_axis_num
    return Piece(
        name=entry.key,
        offset=tuple(entry.global_offset),
        shape=(*lead, *entry.local_shape),
        info=TensorInfo(dtype=entry.data.dtype, shape=tuple(entry.global_shape)),
    )


def _own_pieces(entries: Sequence[ShardedTensor]) -> list[tuple[Piece, Tensor]]:
    """Pieces that this rank gives to the others: of replicas, the first one gives."""
    return [(_piece_of(entry), entry.data) for entry in entries if is_main_replica(entry.replica_id)]


def _addresses(chunks: nn.Module | Sequence[nn.Module]) -> list[tuple[int, torch.dtype, torch.Size]]:
    """Where the parameters and buffers of the chunks are, and what: views stay valid while this is the same."""
    # DistributedDataParallel has a list under the name of `buffers`.
    modules = [unwrap_model(chunk) for chunk in ([chunks] if isinstance(chunks, nn.Module) else chunks)]
    tensors = itertools.chain.from_iterable((*module.parameters(), *module.buffers()) for module in modules)
    return [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors]


def _as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor viewed as bytes, because some backends cannot send every dtype."""
    return tensor.view(-1).view(torch.uint8)


def make_current(chunks: nn.Module | Sequence[nn.Module]) -> None:
    """Gather parameters that an optimizer step has changed on other ranks and has not sent yet.

    With `overlap_param_gather`, DistributedDataParallel gathers parameters in the next forward pass. Until then, a rank
    has old values in the shards of other ranks. Every rank of the data-parallel group must call this.

    Raises:
        ValueError: for Megatron-FSDP, which only has shards of parameters, and for parameters that Transformer Engine
            stores in FP8.
    """
    for chunk in [chunks] if isinstance(chunks, nn.Module) else chunks:
        name = type(chunk).__name__
        if isinstance(chunk, _BaseDataParallel) and not isinstance(chunk, DistributedDataParallel):
            raise ValueError(f"the model is wrapped in {name}: expected DistributedDataParallel, or no wrapper")
        for parameter in chunk.parameters():
            if type(parameter).__module__.startswith("transformer_engine") or parameter.dtype.itemsize < 2:
                raise ValueError(
                    f"a parameter is a {type(parameter).__name__} of dtype {parameter.dtype}: expected 16 or 32 bits. "
                    "Train without fp8_param"
                )
        if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
