"""Verify, on the wrapped model, that everything that was configured to be fp32 is fp32."""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from torch import nn

from megatron_fp32.config import Fp32Config, config_or_default
from megatron_fp32.find_layers import (
    Model,
    find_output_layers,
    named_chunks,
    reasons_without_head,
    why_not_vocabulary_head,
)
from megatron_fp32.gated_delta_net.layer import Fp32GatedDeltaNet
from megatron_fp32.kept_parameters.keep_in_fp32 import kept_parameters, kept_problems
from megatron_fp32.optimizer.checks import communication_problems, offload_problems
from megatron_fp32.optimizer.native_fp32 import pending_repairs
from megatron_fp32.output_layer.fused_loss import has_fused_loss
from megatron_fp32.output_layer.layer import Fp32OutputLayer
from megatron_fp32.validation import check_flag

Chunks = list[tuple[str, nn.Module]]


def check_fp32(
    model: Model, config: Fp32Config | None = None, *, optimizer: Any = None, after_forward: bool = False
) -> None:
    """Raise unless the model chunks of this rank are in fp32 as `config` says.

    It checks:

    - the class of every output layer and gated-delta-net layer, and whether a method of it was replaced;
    - the dtype, the mark, the guard and `main_grad` of every kept parameter, also of parameters that you passed to
      `keep_in_fp32` yourself;
    - the optimizer's groups, and whether a checkpoint of the optimizer could be loaded;
    - what DistributedDataParallel sends in one call;
    - with `after_forward`, the layers' counters of fp32 passes.

    Nothing is changed and nothing is communicated. Call it on every rank.

    Args:
        model: the model chunks, wrapped or not.
        config: the configuration that `apply_fp32` or the model provider was given.
        optimizer: megatron-core's optimizer; it may be a chained one.
        after_forward: at least one forward pass has run, in which every layer took part.

    Raises:
        RuntimeError: with everything that is not in fp32 as configured.
    """
    config = config_or_default(config)
    check_flag("after_forward", after_forward)
    chunks = named_chunks(model)
    kept: dict[str, nn.Parameter] = {}
    problems: list[str] = []
    if config.logits:
        problems += _output_layer_problems(chunks, config, after_forward)
    if config.gated_delta_net:
        problems += _gated_delta_net_problems(chunks, config, after_forward, kept)
    problems += _other_kept_problems(chunks, kept)
    if optimizer is not None:
        elsewhere = bool(config.gated_delta_net) and _has_gated_delta_nets(chunks)
        problems += _optimizer_problems(kept, optimizer, elsewhere=elsewhere)
    problems += communication_problems([chunk for _, chunk in chunks], optimizer)
    if problems:
        raise RuntimeError("not in fp32 as configured:\n" + "\n".join(f"- {problem}" for problem in problems))


def _output_layer_problems(chunks: Chunks, config: Fp32Config, after_forward: bool) -> Iterator[str]:
    found = [
        (prefix + name, owner, layer) for prefix, chunk in chunks for name, owner, layer in find_output_layers(chunk)
    ]
    if not found:
        try:
            reasons_without_head(chunks)
        except ValueError as error:
            yield str(error)
    for name, owner, layer in found:
        if why_not_vocabulary_head(layer, owner) is not None:
            continue
        if not isinstance(layer, Fp32OutputLayer):
            yield f"{name} is a {type(layer).__qualname__}, not an Fp32OutputLayer"
            continue
        if layer.fp32_config != config:
            yield f"{name} was made with {layer.fp32_config}, expected {config}"
        for method in ("forward", "_forward_impl"):
            if method in vars(layer):
                yield f"{name}.{method} was replaced on the instance"
        if config.fused_loss != "off" and not has_fused_loss(owner):
            yield f"{type(owner).__name__}.compute_language_model_loss was replaced: it cannot take deferred logits"
        if after_forward and layer.fp32_calls == 0:
            yield f"{name} never computed fp32 logits: something else computes the loss, or reads the weight alone"


def _gated_delta_net_problems(
    chunks: Chunks, config: Fp32Config, after_forward: bool, kept: dict[str, nn.Parameter]
) -> Iterator[str]:
    layers = [(prefix + name, module) for prefix, chunk in chunks for name, module in chunk.named_modules()]
    for name, layer in layers:
        if not isinstance(layer, GatedDeltaNet):
            continue
        if not isinstance(layer, Fp32GatedDeltaNet):
            yield f"{name} is a {type(layer).__qualname__}, not an Fp32GatedDeltaNet"
            continue
        for method in ("forward", "_apply_gated_norm", "_apply"):
            if method in vars(layer):
                yield f"{name}.{method} was replaced on the instance"
        available = dict(layer.named_parameters())
        for leaf in config.gated_delta_net:
            if leaf not in available:
                yield f"{name} has no parameter {leaf!r}"
                continue
            # Megatron-FSDP replaces each Parameter by its own, whose `orig_param` is the replaced Parameter.
            parameter = getattr(available[leaf], "orig_param", available[leaf])
            kept[f"{name}.{leaf}"] = parameter
            yield from _parameter_problems(f"{name}.{leaf}", parameter)
        if after_forward and layer.fp32_calls == 0:
            yield f"{name} never ran with its kept parameters in fp32"


def _other_kept_problems(chunks: Chunks, kept: dict[str, nn.Parameter]) -> Iterator[str]:
    """Problems of every guard, and of parameters that `keep_in_fp32` keeps although `config` does not name them."""
    for prefix, chunk in chunks:
        for problem in kept_problems(chunk):
            yield prefix + problem
        for name, parameter in kept_parameters(chunk):
            if prefix + name not in kept:
                parameter = getattr(parameter, "orig_param", parameter)
                kept[prefix + name] = parameter
                yield from _parameter_problems(prefix + name, parameter)


def _parameter_problems(name: str, parameter: nn.Parameter) -> Iterator[str]:
    if parameter.dtype != torch.float32:
        yield f"{name} is {parameter.dtype}"
    if not getattr(parameter, "keep_in_fp32", False):
        yield f"{name} has lost its mark keep_in_fp32: the Parameter was replaced"
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None and main_grad.dtype != torch.float32:
        yield f"{name}.main_grad is {main_grad.dtype}"


def _has_gated_delta_nets(chunks: Chunks) -> bool:
    """Whether the whole model has gated-delta-net layers, on this pipeline stage or on another."""
    configs = [getattr(chunk, "config", None) for _, chunk in chunks]
    return any(getattr(c, "experimental_attention_variant", None) == "gated_delta_net" for c in configs)


def _optimizer_problems(kept: dict[str, nn.Parameter], optimizer: Any, *, elsewhere: bool) -> Iterator[str]:
    trained = {name: p for name, p in kept.items() if p.requires_grad}
    # The repairs change what is saved, so they must be installed on every pipeline stage or on none.
    if not trained and not elsewhere:
        return
    for inner in getattr(optimizer, "chained_optimizers", None) or [optimizer]:
        for repair in pending_repairs(inner):
            yield f"optimizer repair {repair.name} is not installed ({repair.symptom}); see install_optimizer_repairs"
        rounded = {id(p) for group in _groups(inner, "model_float16_groups", "float16_groups") for p in group}
        for name, parameter in trained.items():
            if id(parameter) in rounded:
                yield f"the optimizer was built before {name} was fp32, and has {name} among its 16-bit parameters"
        yield from _index_map_problems(trained, inner)
        yield from offload_problems(inner)


def _index_map_problems(trained: dict[str, nn.Parameter], optimizer: Any) -> Iterator[str]:
    """A distributed optimizer that was built before its repair would save states under the wrong names."""
    places = getattr(optimizer, "model_param_group_index_map", None)
    fp32, float16 = (_groups(optimizer, name) for name in ("model_fp32_groups", "model_float16_groups"))
    if not places or not fp32:
        return
    names = {id(p): name for name, p in trained.items()}
    for index, groups in enumerate(zip(fp32, float16, strict=True)):
        for order, parameter in enumerate([*groups[0], *groups[1]]):
            if id(parameter) in names and places[parameter] != (index, order):
                yield (
                    "the optimizer was built before install_optimizer_repairs: it would save the states of "
                    f"{names[id(parameter)]} under another parameter"
                )


def _groups(optimizer: Any, *names: str) -> list[list[nn.Parameter]]:
    return [group for name in names for group in getattr(optimizer, name, None) or []]
