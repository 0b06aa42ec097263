"""What a comparison pairs by name, and how two layouts of one Hugging Face model come under common names.

A model may have fused experts (`experts.gate_up_proj` [E, 2F, H], or transposed) or one tensor for each, and stand
alone (`model.`) or inside of a vision-language model (`model.language_model.`). The mappings of both checkpoints lead
to the same Megatron tensors: a tensor that holds what the other checkpoint has in several is taken apart into tensors
with their names and shapes, one mapping in memory at a time. Nothing but the order of values changes on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from megatron_fp32.weights.experts import FUSED
from megatron_fp32.weights.mapping import TensorMapping
from megatron_fp32.weights.model_map import ModelMap
from megatron_fp32.weights.spec import TensorSpec
from megatron_fp32.weights.tensors import TensorInfo

_Part = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Name, index and shape of a Megatron tensor."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor of a checkpoint, or what stands for one: a part of it, or all rows but the padding."""

    name: str
    """What it is called where the other checkpoint has no such tensor."""
    info: TensorInfo
    read: Callable[[tuple[int, ...]], Tensor]
    """Element `index` of it."""
    origin: str = ""
    """The tensor that it is a part of, where its name is that of a tensor in the other checkpoint."""


Entries = Mapping[str, Entry]
"""By the name under which they are compared."""


def note_on_names(name: str, a: Entry, b: Entry) -> str:
    """What the checkpoints call two entries that are compared under `name`, where it is something else."""
    own = {"A": a.origin or a.name, "B": b.origin or b.name}
    return ", ".join(f"{theirs} in {side}" for side, theirs in own.items() if theirs != name)


def under_common_names(a: Entries, b: Entries, plans: Sequence[ModelMap]) -> tuple[Entries, Entries]:
    """Name the entries of two Hugging Face checkpoints alike where they are the same part of a model.

    What has the same name in both keeps it, whatever it is. Fused experts that one of them has transposed are turned.

    Args:
        a: every tensor, by its own name.
        b: the same of the other.
        plans: of a and of b, with one set of Megatron tensors for each layer.

    Returns:
        The entries by common names: those of a, or where a's tensors are taken apart those of b with a's prefix.
    """
    first, second = plans
    own, common = second.naming.prefix, first.naming.prefix

    def renamed(name: str) -> str:
        other = common + name.removeprefix(own)
        return other if name.startswith(own) and name not in a and other not in b else name

    alike = {renamed(name): entry for name, entry in b.items()}
    of_a = first.mappings
    of_b = [m.place(hf=lambda spec: dataclasses.replace(spec, name=renamed(spec.name))) for m in second.mappings]
    named_a, named_b = _taken_apart(a, of_a, alike, of_b), _taken_apart(alike, of_b, a, of_a)
    if first.naming.transposed_experts != second.naming.transposed_experts:
        named_b = {n: _turned(e) if n in named_a and FUSED.fullmatch(n) else e for n, e in named_b.items()}
    return named_a, named_b


def _turned(entry: Entry) -> Entry:
    """A stack of matrices as the stack of their transposes."""
    shape = entry.info.shape
    info = dataclasses.replace(entry.info, shape=(*shape[:-2], shape[-1], shape[-2]))
    return dataclasses.replace(entry, info=info, read=lambda index: entry.read(index).transpose(-1, -2))


def _taken_apart(
    entries: Entries, mappings: Sequence[TensorMapping], others: Entries, of_others: Sequence[TensorMapping]
) -> Entries:
    """The entries, with parts in place of those that the other checkpoint has in several tensors."""
    owners = {part: mapping for mapping in of_others for part in _parts(mapping)}
    found, cut, kept = dict(entries), set(), []
    for mapping in mappings:
        source = mapping.hf[0]
        entry = entries.get(source.name)
        finer = _finer(mapping, owners)
        is_new = source.name not in others and not any(spec.name in entries for other in finer for spec in other.hf)
        if entry is not None and entry.info.shape == source.stored_shape and finer and is_new:
            cut.add(source.name)
            found |= {spec.name: _part(entry, mapping, target, spec) for target in finer for spec in target.hf}
        else:
            kept.append(mapping)
    # Elements that the other checkpoint does not have.
    for spec in (spec for mapping in kept for spec in mapping.hf if spec.name in cut):
        entry = entries[spec.name]
        info = TensorInfo(dtype=entry.info.dtype, shape=spec.shape)
        name = str(dataclasses.replace(spec, name=entry.name))
        found[str(spec)] = Entry(name=name, info=info, read=lambda index, e=entry, s=spec: e.read((*s.index, *index)))
    return {name: entry for name, entry in found.items() if name not in cut}


def _finer(mapping: TensorMapping, owners: Mapping[_Part, TensorMapping]) -> list[TensorMapping]:
    """The other checkpoint's mappings that hold all of this one's only tensor, in several or outside of its stack."""
    parts = _parts(mapping)
    others = list(dict.fromkeys(owners[part] for part in parts if part in owners))
    specs = [spec for other in others for spec in other.hf]
    is_finer = len(mapping.hf) == 1 and (len(specs) > 1 or bool(mapping.hf[0].stack))
    is_same = {part for other in others for part in _parts(other)} == set(parts)
    is_exact = all(other.invertible for other in (mapping, *others))
    return others if is_finer and is_same and is_exact and not any(spec.stack for spec in specs) else []


def _part(entry: Entry, mapping: TensorMapping, target: TensorMapping, spec: TensorSpec) -> Entry:
    source = mapping.hf[0]

    def read(index: tuple[int, ...]) -> Tensor:
        megatron = dict(zip(_parts(mapping), mapping.to_megatron([entry.read(source.index)]), strict=True))
        tensors = target.to_hf([megatron[part] for part in _parts(target)])
        return tensors[target.hf.index(spec)][index]

    info = TensorInfo(dtype=entry.info.dtype, shape=spec.stored_shape)
    return Entry(name=spec.name, info=info, read=read, origin=str(dataclasses.replace(source, name=entry.name)))


def _parts(mapping: TensorMapping) -> list[_Part]:
    return [(spec.name, spec.index, spec.shape) for spec in mapping.megatron]
