"""Models on the ranks of a layout: built by this package's provider, loaded and saved by megatron-core."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor

from megatron_fp32.checkpoint.formats.digests import digest
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.sidecar import find_sidecar
from megatron_fp32.config import Fp32Config
from megatron_fp32.models import provider
from megatron_fp32.models.live import LiveTensors, sharded_tensors
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.weights.model_map import map_trained_model
from megatron_fp32.weights.restore import Restorer

_LOAD = inspect.signature(dist_checkpointing.load).parameters

KNOWS_COMMON_STATE = "common_strategy" not in _LOAD
"""megatron-core up to 0.18 reads `common.pt`, and `raise_all` names `common_state` as a key that the model lacks."""

STRICTNESS = (*(["raise_all"] if KNOWS_COMMON_STATE else []), "raise_unexpected", _LOAD["strict"].default)
"""How strict megatron-core can be with an import, its default last."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Parallel sizes."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int | None = None
    expert: int = 1
    expert_tensor: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    """Fields of `TransformerConfig`, such as how many layers the first stage has."""

    @property
    def ranks(self) -> int:
        """As few as possible."""
        return self.pipeline * max(self.tensor, self.expert * (self.expert_tensor or self.tensor))

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "PP": self.pipeline, "VP": self.virtual or 1, "EP": self.expert}
        split = [f"{name}{size}" for name, size in sizes.items() if size > 1]
        return "-".join([*split, *([f"ETP{self.expert_tensor}"] if self.expert_tensor else [])])

    def parallel(self) -> contextlib.AbstractContextManager[None]:
        """megatron-core's parallel state."""
        return model_parallel(
            tensor=self.tensor,
            pipeline=self.pipeline,
            virtual=self.virtual,
            expert=self.expert,
            expert_tensor=self.expert_tensor,
        )

    def fields(self) -> dict[str, Any]:
        """Fields of `TransformerConfig`."""
        return {
            "tensor_model_parallel_size": self.tensor,
            "sequence_parallel": self.tensor > 1,
            "pipeline_model_parallel_size": self.pipeline,
            "virtual_pipeline_model_parallel_size": self.virtual,
            "expert_model_parallel_size": self.expert,
            "expert_tensor_parallel_size": self.expert_tensor,
            **dict(self.options),
        }


ONE_RANK = Layout()


def on_ranks(layout: Layout, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`function(*args, layout=layout, **kwargs)` within the layout; for `RankPool.run`."""
    with layout.parallel():
        return function(*args, layout=layout, **kwargs)


def build(
    hf: Path,
    layout: Layout = ONE_RANK,
    *,
    mtp: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    fp32: Fp32Config | None = None,
) -> list[GPTModel]:
    """The chunks of this rank; in bf16 they have been through Float16Module."""
    shapes = provider.read_hf_config(hf)
    chunks = []
    for stage in [None] if layout.virtual is None else range(layout.virtual):
        config = provider.transformer_config(
            shapes,
            **provider.cpu_overrides(),
            **layout.fields(),
            mtp_num_layers=1 if mtp else None,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=dtype == torch.bfloat16,
        )
        chunk = provider.build_model(
            shapes,
            config,
            fp32,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage,
            parallel_output=False,
        )
        if config.bf16:
            Float16Module(config, chunk)  # casts in place
        chunks.append(chunk)
    return chunks


def load(chunks: Sequence[GPTModel], imported: Path, *, strict: Any = "raise_unexpected") -> None:
    """Load what an import made; what megatron-core leaves out is NaN afterwards."""
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
    loaded = dist_checkpointing.load(_state(chunks), str(imported / "release"), strict=strict)
    for name, chunk in _named(chunks).items():
        chunk.load_state_dict(loaded[name])


def save(chunks: Sequence[GPTModel], out: Path) -> None:
    out.mkdir(exist_ok=True)
    dist_checkpointing.save(_state(chunks), str(out))


def _named(chunks: Sequence[GPTModel]) -> dict[str, GPTModel]:
    """As Megatron-LM calls them."""
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{i}": chunk for i, chunk in enumerate(chunks)}


def _state(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    metadata = ensure_metadata_has_dp_cp_group({})
    return {name: chunk.sharded_state_dict(metadata=metadata) for name, chunk in _named(chunks).items()}


def pass_through(
    hf: Path,
    imported: Path,
    out: Path,
    *,
    layout: Layout = ONE_RANK,
    mtp: bool = False,
    fp32: Fp32Config | None = None,
    strictness: Sequence[Any] = STRICTNESS,
) -> list[str]:
    """Load into a bf16 model, each time less strictly, and save it again; what differs from the source or the file."""
    chunks = build(hf, layout, mtp=mtp, fp32=fp32)
    for strict in strictness:
        load(chunks, imported, strict=strict)
    save(chunks, out)
    dist.barrier()  # the first rank writes the metadata last
    unlike = [] if fp32 is not None else unlike_source(chunks, hf, imported)
    return unlike + unlike_saved(chunks, out)


def unlike_saved(chunks: Sequence[GPTModel], saved: Path) -> list[str]:
    """What this rank has, and another one saved: keys of tensors that differ, and parameters that are in none."""
    reader, pieces = TorchDistReader(saved), sharded_tensors(chunks)
    differ = [p.key for p in pieces if not torch.equal(reader.read(p.key)[p.global_slice()], p.data)]
    storages = {piece.data.untyped_storage().data_ptr() for piece in pieces}
    named = [pair for chunk in chunks for pair in chunk.named_parameters()]
    return differ + [name for name, parameter in named if parameter.untyped_storage().data_ptr() not in storages]


def unlike_source(chunks: Sequence[GPTModel], hf: Path, imported: Path) -> list[str]:
    """Hugging Face tensors of the live model that are not the source's bytes, and mappings that no rank holds."""
    live, sidecar = LiveTensors(chunks, group=dist.group.WORLD), find_sidecar(imported)
    model = map_trained_model(sidecar.hf_config, sidecar.infos, live.tensors)
    restorer = Restorer(live, sidecar.originals())
    differ, left = [], set(sidecar.tensors)
    with HuggingFaceReader(hf) as source:
        for mapping in model.mappings:
            for spec, tensor in zip(mapping.hf, restorer.restore(mapping).hf, strict=True):
                expected = source.read(spec.name, spec.index)
                left.discard(spec.name)
                if digest(tensor.to(expected.dtype)) != digest(expected):
                    differ.append(str(spec))
    held: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(held, {str(mapping.hf[0]) for mapping in model.subset(live.holds)})
    return differ + sorted(left) + sorted({str(mapping.hf[0]) for mapping in model.mappings} - set().union(*held))


def logits(hf: Path, imported: Path, tokens: Tensor, *, layout: Layout = ONE_RANK, mtp: bool = False) -> Tensor | None:
    """fp32, without the vocabulary's padding, on the ranks of the last stage; None on the others.

    Args:
        tokens: [b, s], the same on every rank.
        layout: without virtual stages.
    """
    (model,) = build(hf, layout, mtp=mtp, dtype=torch.float32)
    load([model], imported)
    batch, length = tokens.shape
    if not model.pre_process:
        rows = length // (layout.tensor if model.config.sequence_parallel else 1)
        hidden = torch.empty(rows, batch, model.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    caught: list[Tensor] = []
    if model.post_process:
        # Models with MTP compute no logits without labels in megatron-core 0.16, and no loss keeps them as they are.
        model.output_layer.register_forward_hook(lambda module, args, output: caught.append(output[0].clone()))
    positions, mask = torch.arange(length).expand_as(tokens), torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    labels = {"labels": tokens, "loss_mask": torch.ones(tokens.shape)} if mtp else {}
    with torch.no_grad():
        output: Tensor = model.eval()(tokens, positions, mask, **labels)
    if model.post_process:
        return caught[-1].transpose(0, 1)[..., : provider.read_hf_config(hf).vocab_size]
    dist.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None
