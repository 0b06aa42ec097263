"""Find the output layers of a built model, and which model chunks must have one."""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.utils import unwrap_model
from torch import nn

Model = nn.Module | Sequence[nn.Module]
"""A model, or the list of model chunks of a pipeline stage."""


def named_chunks(model: Model) -> list[tuple[str, nn.Module]]:
    """(prefix for names, chunk) of every model chunk. The prefix is empty where there is one chunk."""
    if isinstance(model, nn.Module):
        return [("", model)]
    chunks = list(model)
    if not chunks or not all(isinstance(chunk, nn.Module) for chunk in chunks):
        raise TypeError(f"expected a module or a non-empty list of modules, got {model!r}")
    return [(f"chunk {i}: " if len(chunks) > 1 else "", chunk) for i, chunk in enumerate(chunks)]


def find_output_layers(chunk: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(name, parent module, layer) of every `output_layer`. For a LoRA wrapper, the layer is the wrapped one."""
    for name, layer in chunk.named_modules():
        parent, _, leaf = name.rpartition(".")
        if leaf != "output_layer":
            continue
        owner = chunk.get_submodule(parent)
        while (wrapped := _inside(layer)) is not None:
            attribute, layer = wrapped
            name = f"{name}.{attribute}"
        yield name, owner, layer


def _inside(layer: nn.Module) -> tuple[str, nn.Module] | None:
    """(attribute, layer) that a LoRA wrapper wraps: `to_wrap` in Megatron-Bridge, `base_layer` in PEFT."""
    for attribute in ("to_wrap", "base_layer"):
        if isinstance(inner := getattr(layer, attribute, None), nn.Module):
            return attribute, inner
    return None


def why_not_vocabulary_head(layer: nn.Module, owner: nn.Module) -> str | None:
    """Why a layer does not project onto the vocabulary; None if it does."""
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    rows, vocab = (
        getattr(layer, "output_size", getattr(layer, "out_features", None)),
        getattr(owner, "vocab_size", None),
    )
    if isinstance(layer, nn.Linear) and (vocab is None or layer.out_features < vocab):
        return f"a value head ({kind})"
    if not isinstance(layer, ColumnParallelLinear) and rows is not None and vocab is not None and rows < vocab:
        tensor_parallel = getattr(getattr(layer, "config", None), "tensor_model_parallel_size", 1)
        if rows * tensor_parallel < vocab:
            return f"a head of {rows} outputs for a vocabulary of {vocab} ({kind})"
    return None


def reasons_without_head(chunks: list[tuple[str, nn.Module]]) -> list[tuple[str, str]]:
    """(name, reason) of chunks that do not need an output layer; the chunks have none.

    Raises:
        ValueError: when a chunk must have an output layer, or does not say whether it must.
    """
    bare = [(prefix, unwrap_model(chunk)) for prefix, chunk in chunks]
    encoders = [pair for pair in bare if getattr(pair[1], "add_decoder", True) is False]
    skipped = [(f"{prefix}{type(chunk).__name__}", "an encoder without a decoder") for prefix, chunk in encoders]
    chunks = [pair for pair in bare if pair not in encoders]
    if not chunks:
        return skipped
    stages: list[tuple[str, Any]] = [
        (prefix + (name or type(module).__name__), module)
        for prefix, chunk in chunks
        for name, module in chunk.named_modules()
        if isinstance(module, LanguageModule)
    ]
    if not stages:
        raise ValueError("no module called output_layer, and no language model that says whether it should have one")
    # The last pipeline stage of a T5 encoder does not have an output layer.
    missing = [name for name, module in stages if module.post_process and getattr(module, "add_decoder", True)]
    if missing:
        raise ValueError(f"no module called output_layer in {', '.join(missing)}, a last pipeline stage")
    return skipped
