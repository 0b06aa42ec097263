"""Which layer a tensor belongs to, by its name."""

from __future__ import annotations

import re
from typing import NamedTuple

_LAYER = re.compile(r"(?P<layers>(?:.*?\.)?(?:layers|blocks))\.(?P<number>\d+)\.(?P<module>.+)")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")

NO_LAYER = "no layer"


class Layer(NamedTuple):
    """A layer; sorts by the name of its list, then by its number."""

    layers: str
    """The list that it is in, such as `model.layers`, `mtp.layers` or `model.visual.blocks`; empty for no layer."""
    number: int

    def __str__(self) -> str:
        return f"{self.layers}.{self.number}" if self.layers else NO_LAYER


def split_name(name: str) -> tuple[Layer, str]:
    """The layer and the rest of the name: `model.layers.3.mlp.up_proj.weight` is layer 3's `mlp.up_proj.weight`.

    Embeddings, heads and tensors that hold all layers at once belong to no layer; their name is whole.
    """
    found = _LAYER.fullmatch(name)
    if found is None:
        return Layer("", 0), name
    return Layer(found["layers"], int(found["number"])), found["module"]


def without_numbers(name: str) -> str:
    """A name with `*` for every number: `decoder.layers.*.mlp.experts.*.weight`."""
    return _NUMBER.sub("*", name)
