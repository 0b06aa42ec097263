"""Gives the tensors of two Hugging Face checkpoints of one model common names and shapes, for a comparison by name.

Two checkpoints of one model can differ in two ways. Experts may be fused (`experts.gate_up_proj` [E, 2F, H], or
transposed) or separate. The text model may stand alone (`model.`) or be part of a vision-language model
(`model.language_model.`). The mappings of both checkpoints lead to equal Megatron tensors. With them, a tensor that is
several tensors in the other checkpoint is split into tensors with those names and shapes, one mapping at a time. Only
the order of values changes.
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
"""(name, index, shape) of a Megatron tensor, or of an element of a stack."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to compare: a tensor of a checkpoint, a piece of one, or a tensor without its padding rows."""

    name: str
    """The name to report if the other checkpoint does not have this tensor."""
    info: TensorInfo
    read: Callable[[tuple[int, ...]], Tensor]
    """Reads element `index`, or with () the whole tensor."""
    origin: str = ""
    """For a piece of a tensor with a name from the other checkpoint: the tensor that it belongs to."""


Entries = Mapping[str, Entry]
"""Entries by the name under which they are compared."""


def note_on_names(name: str, a: Entry, b: Entry) -> str:
    """The names of two entries in their checkpoints, as far as they are not `name`, under which they are compared."""
    names = {"A": a.origin or a.name, "B": b.origin or b.name}
    return ", ".join(f"{own} in {side}" for side, own in names.items() if own != name)


def under_common_names(a: Entries, b: Entries, plans: Sequence[ModelMap]) -> tuple[Entries, Entries]:
    """Give entries of two Hugging Face checkpoints one name if they hold one part of a model.

    A name that both checkpoints have stays. Fused experts that only one checkpoint has transposed are transposed back.

    Args:
        a: every tensor of a, by its own name.
        b: every tensor of b, by its own name.
        plans: the mappings of a and of b, with one set of Megatron tensors for each layer.

    Returns:
        The entries of a and of b by common names. These are a's names, except where tensors of a are split: then they
        are b's names with a's prefix.
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
    """The entry with the last two axes exchanged."""
    shape = entry.info.shape
    info = dataclasses.replace(entry.info, shape=(*shape[:-2], shape[-1], shape[-2]))
    return dataclasses.replace(entry, info=info, read=lambda index: entry.read(index).transpose(-1, -2))


def _taken_apart(
    entries: Entries, mappings: Sequence[TensorMapping], others: Entries, of_others: Sequence[TensorMapping]
) -> Entries:
    """The entries. An entry that is several tensors in the other checkpoint is replaced by its pieces."""
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
    # Elements of split stacks that the other checkpoint does not have.
    for spec in (spec for mapping in kept for spec in mapping.hf if spec.name in cut):
        entry = entries[spec.name]
        info = TensorInfo(dtype=entry.info.dtype, shape=spec.shape)
        name = str(dataclasses.replace(spec, name=entry.name))
        found[str(spec)] = Entry(name=name, info=info, read=lambda index, e=entry, s=spec: e.read((*s.index, *index)))
    return {name: entry for name, entry in found.items() if name not in cut}


def _finer(mapping: TensorMapping, owners: Mapping[_Part, TensorMapping]) -> list[TensorMapping]:
    """The other checkpoint's mappings that split the only tensor of `mapping`; [] if they do not split it."""
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
