"""Turn the layers of a model that is already built into fp32 layers.

Call `apply_fp32` right after the model is built: before weights are loaded, and before Float16Module,
DistributedDataParallel and the optimizer. Call `check_fp32` after them.
"""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import dataclasses
import logging
from typing import Any

from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_linear_attention_pattern
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import nn

from megatron_fp32.config import Fp32Config, Weights, check_weights, config_or_default
from megatron_fp32.find_layers import (
    Model,
    find_output_layers,
    named_chunks,
    reasons_without_head,
    why_not_vocabulary_head,
)
from megatron_fp32.gated_delta_net.layer import VARIANTS, check_gated_delta_net, to_fp32_gated_delta_net
from megatron_fp32.kept_parameters.keep_in_fp32 import KeptParameter
from megatron_fp32.optimizer.native_fp32 import OptimizerRepairs, install_optimizer_repairs
from megatron_fp32.output_layer.fused_loss import check_owner, set_fused_loss
from megatron_fp32.output_layer.layer import check_output_layer, to_fp32_output_layer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp32Report:
    """What `apply_fp32` did to the model chunks of this rank."""

    output_layers: tuple[str, ...]
    """Names of the output layers whose logits are fp32 now."""
    parameters: tuple[KeptParameter, ...]
    """The parameters that are kept in fp32 now, with their full names."""
    skipped: tuple[tuple[str, str], ...]
    """(name, reason) of every layer or parameter that looks like one to change and was not changed."""

    @property
    def rounded(self) -> tuple[str, ...]:
        """Kept parameters whose values are all exact in bfloat16: they were probably rounded before `apply_fp32`."""
        return tuple(p.name for p in self.parameters if p.on_bf16_grid and not p.redrawn)

    def __str__(self) -> str:
        lines = [f"fp32 logits: {', '.join(self.output_layers) or 'none'}"]
        drawn = sum(p.redrawn for p in self.parameters)
        lines.append(f"fp32 parameters: {len(self.parameters)}, {drawn} of them drawn again")
        if self.rounded:
            lines.append(f"values were rounded to bfloat16 before: {', '.join(self.rounded)}")
        lines += [f"skipped: {name}: {reason}" for name, reason in self.skipped]
        return "\n".join(lines)


def apply_fp32(model: Model, config: Fp32Config | None = None, *, weights: Weights) -> Fp32Report:
    """Make output layers compute fp32 logits and gated-delta-net layers keep their parameters in fp32, in place.

    Output layers are the modules called `output_layer`, wherever they are: in chunks of a virtual pipeline, inside the
    language model of a vision-language model, in GPTModel, HybridModel, T5 and BERT. In a LoRA wrapper, the wrapped
    layer is changed. Heads that do not project onto the vocabulary stay as they are and are reported. All layers are
    checked before the first one is changed.

    Args:
        model: the model as built, on any device: before Float16Module, DistributedDataParallel and the first forward
            pass.
        config: what to keep in fp32; the default is logits, `A_log` and `out_norm`.
        weights: where the model's values come from. `"initialized"`: megatron-core drew them; it drew `A_log` in 16
            bits, so `A_log` is drawn again in fp32 (if `perform_initialization` is on). `"loaded"`: a checkpoint was
            loaded; every value stays.

    Raises:
        ValueError: for another value of `weights`; when the model is wrapped already; when a layer that the model must
            have is not found; or when a layer uses a feature that fp32 logits do not support.
        TypeError: when a layer has a class that cannot be changed.
    """
    check_weights(weights)
    config = config_or_default(config)
    chunks = named_chunks(model)
    for name, chunk in chunks:
        _refuse_wrapped(name, chunk)
    heads, skipped = _find_heads(chunks) if config.logits else ([], [])
    if config.logits and not heads and not skipped:
        skipped += reasons_without_head(chunks)
    for name, owner, head in heads:
        check_output_layer(head, config)
        check_owner(name, owner, config)
    layers = _find_gated_delta_nets(chunks, config.gated_delta_net) if config.gated_delta_net else []
    if config.gated_delta_net:
        skipped += _unknown_a_logs(chunks)
    for _, owner, head in heads:
        to_fp32_output_layer(head, config)
        set_fused_loss(owner, config)
    parameters = [
        dataclasses.replace(kept, name=f"{name}.{kept.name}")
        for name, layer in layers
        for kept in to_fp32_gated_delta_net(layer, config.gated_delta_net, weights=weights)
    ]
    return Fp32Report(
        output_layers=tuple(name for name, _, _ in heads), parameters=tuple(parameters), skipped=tuple(skipped)
    )


class PreWrapHook:
    """`apply_fp32` as a hook that takes the list of model chunks and returns it. `pre_wrap_hook` makes it.

    Attributes:
        optimizer_repairs: the handle of the optimizer repairs; None until the hook is first called, and always where
            no parameters are kept. Call its `undo()` after the run.
    """

    is_megatron_fp32 = True
    """Distinguishes this hook from others in a list of hooks."""

    def __init__(self, config: Fp32Config, weights: Weights) -> None:
        self.optimizer_repairs: OptimizerRepairs | None = None
        self._config, self._weights = config, weights
        self.__name__ = "megatron_fp32_pre_wrap_hook"

    def __copy__(self) -> PreWrapHook:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PreWrapHook:
        """Itself, as a function is: frameworks copy their configurations, and the handle must stay reachable."""
        return self

    def __call__(self, chunks: list[Any]) -> list[Any]:
        """Apply `apply_fp32` to the model chunks of this rank, log the report, and return the chunks."""
        report = apply_fp32(chunks, self._config, weights=self._weights)
        logger.info("megatron_fp32:\n%s", report)
        # Installed on every stage, because a pipeline stage without such a layer must save and load like the others.
        if self._config.gated_delta_net and self.optimizer_repairs is None:
            self.optimizer_repairs = install_optimizer_repairs()
        return chunks


def pre_wrap_hook(config: Fp32Config | None = None, *, weights: Weights) -> PreWrapHook:
    """`apply_fp32` as a hook that takes the list of model chunks and returns it.

    Use it in `pre_wrap_hooks` of megatron-core's model configurations (HybridModel >= 0.18, GPTModel >= 0.19), or with
    Megatron-Bridge's `register_pre_wrap_hook(hook, prepend=True)`. The hook logs what it did.

    If parameters are kept, the hook also installs the optimizer repairs on every rank: without them, the optimizer of
    such a model cannot save. See `PreWrapHook.optimizer_repairs`.

    Args:
        config: see `apply_fp32`.
        weights: see `apply_fp32`. Pass `"initialized"` if the hook runs before weights are loaded.

    Raises:
        ValueError: for another value of `weights`.
    """
    check_weights(weights)
    return PreWrapHook(config_or_default(config), weights)


# Finding


def _refuse_wrapped(name: str, chunk: nn.Module) -> None:
    for module in chunk.modules():
        if isinstance(module, (Float16Module, _BaseDataParallel)):
            raise ValueError(
                f"{name}the model is wrapped in {type(module).__name__} already: apply_fp32 must come before, because "
                "the wrapper has rounded the parameters that must stay fp32, or remembers their 16-bit dtype"
            )


def _find_heads(
    chunks: list[tuple[str, nn.Module]],
) -> tuple[list[tuple[str, nn.Module, ColumnParallelLinear]], list[tuple[str, str]]]:
    heads, skipped = [], []
    for prefix, chunk in chunks:
        for name, owner, layer in find_output_layers(chunk):
            reason = why_not_vocabulary_head(layer, owner)
            if reason is not None:
                skipped.append((prefix + name, reason))
                continue
            if not isinstance(layer, ColumnParallelLinear):
                kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
                why = "computes its product in MXFP8" if "TELMHead" in type(layer).__name__ else ""
                raise TypeError(
                    f"{prefix}{name} is a {kind}, which {why or 'is not a ColumnParallelLinear'}: its logits cannot "
                    "be fp32. Build the model without this layer, or use Fp32Config(logits=False)"
                )
            heads.append((prefix + name, owner, layer))
    return heads, skipped


def _find_gated_delta_nets(
    chunks: list[tuple[str, nn.Module]], names: tuple[str, ...]
) -> list[tuple[str, GatedDeltaNet]]:
    layers = []
    for prefix, chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, GatedDeltaNet):
                check_gated_delta_net(module, names)
                layers.append((prefix + name, module))
            # A HybridStack is not a TransformerBlock, and its layers follow another pattern.
            elif isinstance(module, TransformerBlock):
                _expect_gated_delta_nets(prefix + name, module)
    return layers


def _expect_gated_delta_nets(name: str, block: TransformerBlock) -> None:
    """Raise if a layer that `linear_attention_freq` makes a gated-delta-net layer is something else."""
    if getattr(block.config, "experimental_attention_variant", None) not in VARIANTS:
        return
    pattern = get_linear_attention_pattern(block.config)
    for index, layer in enumerate(block.layers):
        attention = getattr(layer, "self_attention", None)
        if pattern[layer.layer_number - 1] and not isinstance(attention, GatedDeltaNet):
            raise ValueError(
                f"{name}.layers.{index} must hold megatron-core's GatedDeltaNet, because linear_attention_freq says "
                f"so, but its self_attention is a {type(attention).__name__}"
            )


def _unknown_a_logs(chunks: list[tuple[str, nn.Module]]) -> list[tuple[str, str]]:
    return [
        (f"{prefix}{name}.A_log", f"{type(module).__name__} is not megatron-core's GatedDeltaNet; see keep_in_fp32")
        for prefix, chunk in chunks
        for name, module in chunk.named_modules()
        if "A_log" in module._parameters and not isinstance(module, GatedDeltaNet)
    ]
