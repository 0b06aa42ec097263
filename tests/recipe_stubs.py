"""Stand-ins for the programs of docs/recipes.md, with the signatures of the sources that it names.

Each keeps what a recipe must keep: hooks get a list of chunks and return it, weights arrive in a hook, and the model is
wrapped after the last one.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module

from tests.support import stock_model

Hook = Callable[[list[Any]], list[Any]]


def built(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
    return stock_model(stage={"pre_process": pre_process, "post_process": post_process, "vp_stage": vp_stage})


def wrapped(hooks: list[Hook]) -> list[Any]:
    model = [built()]
    for hook in hooks:
        model = hook(model)
    return [Float16Module(chunk.config, chunk) for chunk in model]


# Megatron-LM


def get_args() -> Any:
    return types.SimpleNamespace(custom_model_provider_path="this one")


def gpt_builder(
    args: Any,
    pre_process: bool,
    post_process: bool,
    vp_stage: Any = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    return built(pre_process, post_process, vp_stage)


def gpt_config_from_args(args: Any, config: Any = None, model_config_cls: type = object) -> Any:
    return types.SimpleNamespace(pre_wrap_hooks=[], post_wrap_hooks=[])


# Megatron-Bridge


class Provider:
    """`ModelProviderMixin` of Megatron-Bridge."""

    def __init__(self) -> None:
        self.loaded_into: list[torch.dtype] = []
        self._pre_wrap_hooks: list[Hook] = [self.load_weights]

    def load_weights(self, chunks: list[Any]) -> list[Any]:
        self.loaded_into = [chunk.decoder.layers[0].self_attention.A_log.dtype for chunk in chunks]
        return chunks

    def register_pre_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        self._pre_wrap_hooks.insert(0 if prepend else len(self._pre_wrap_hooks), hook)

    def provide_distributed_model(self, ddp_config: Any = None, wrap_with_ddp: bool = True) -> list[Any]:
        return wrapped(self._pre_wrap_hooks)


class Bridge:
    """`AutoBridge` of Megatron-Bridge."""

    provider: Provider
    """The last that one has made."""

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | None = None) -> Provider:
        Bridge.provider = Provider()
        return Bridge.provider


# NeMo-RL


def setup_model_and_optimizer(
    policy_cfg: Any,
    megatron_cfg: Any,
    load_optimizer: bool = True,
    get_embedding_ranks: Any = None,
    get_position_embedding_ranks: Any = None,
    pre_load_checkpoint_hook: Callable[..., Any] | None = None,
    additional_pre_wrap_hooks: list[Hook] | None = None,
    load_weights: bool = True,
) -> Any:
    return wrapped(list(additional_pre_wrap_hooks or []))


# slime


def _get_model_provider_func(args: Any, role: str = "actor") -> Any:
    assert args.custom_model_provider_path is None, "it would call itself"

    def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
        return built(pre_process, post_process, vp_stage)

    return model_provider


# verl


class MegatronEngineWithLMHead:
    """Of verl; `_build_megatron_module` runs after `_build_tf_config`."""

    def _build_tf_config(self) -> None:
        self.provider = Bridge().to_megatron_provider(load_weights=False)

    def _build_megatron_module(self) -> list[Any]:
        return self.provider.provide_distributed_model(wrap_with_ddp=False)


class EngineRegistry:
    """Of verl."""

    _engines: dict[str, Any] = {"language_model": {"megatron": {"cuda": MegatronEngineWithLMHead}}}


def modules() -> dict[str, types.ModuleType]:
    """What the recipes import and is not installed, by name."""
    contents: dict[str, dict[str, Any]] = {
        "gpt_builders": {"gpt_builder": gpt_builder},
        "megatron.training": {"get_args": get_args},
        "megatron.training.argument_utils": {"gpt_config_from_args": gpt_config_from_args},
        "nemo_rl.models.megatron.setup": {"setup_model_and_optimizer": setup_model_and_optimizer},
        "slime.backends.megatron_utils.model_provider": {"_get_model_provider_func": _get_model_provider_func},
        "verl.workers.engine.base": {"EngineRegistry": EngineRegistry},
        "verl.workers.engine.megatron.transformer_impl": {"MegatronEngineWithLMHead": MegatronEngineWithLMHead},
    }
    made: dict[str, types.ModuleType] = {}
    for name, names in contents.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            package = ".".join(parts[:depth])
            if package != "megatron":
                made.setdefault(package, types.ModuleType(package))
        vars(made[name]).update(names)
    return made
