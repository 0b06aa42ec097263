"""Megatron-LM and Megatron-Bridge."""

from __future__ import annotations

import argparse
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.transformer.module import Float16Module

from megatron_fp32.testing.training import Batch
from tests.recipe_stubs.common import Hook, Modules, Run, built

# Megatron-LM


def forward_step(data_iterator: Iterator[Batch], model: Any, return_schedule_plan: bool = False) -> Any:
    batch = next(data_iterator)
    length = batch.tokens.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    losses = model(batch.tokens, torch.arange(length).expand_as(batch.tokens), mask, labels=batch.labels)
    return losses, lambda per_token: (per_token.float().mean(), {})


def train_valid_test_datasets_provider(train_val_test_num_samples: list[int], vp_stage: int | None = None) -> Any:
    raise AssertionError("no data is read")


def get_embedding_ranks(pp_ranks: list[int]) -> list[int]:
    return pp_ranks


def gpt_builder(
    args: Any,
    pre_process: bool,
    post_process: bool,
    vp_stage: Any = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    return built(pre_process, post_process, vp_stage)


def model_provider(
    model_builder: Callable[..., Any],
    pre_process: Any = True,
    post_process: Any = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> Any:
    return model_builder({}, pre_process, post_process, vp_stage, config=config, pg_collection=pg_collection)


class MegatronLM:
    """`megatron.training` of 0.19; `older` has what differs in 0.16 to 0.18."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.args: Any = argparse.Namespace(custom_model_provider_path="this one")

    def get_args(self) -> Any:
        return self.args

    def parse_and_validate_args(
        self, extra_args_provider: Any = None, ignore_unknown_args: Any = False, args_defaults: Any = None
    ) -> Any:
        self.args = extra_args_provider(argparse.ArgumentParser()).parse_args(self.run.flags)
        return self.args

    def gpt_config_from_args(self, args: Any, config: Any = None, model_config_cls: Any = object) -> Any:
        assert args is self.args
        return types.SimpleNamespace(pre_wrap_hooks=[], post_wrap_hooks=[])

    def pretrain_cfg_container_from_args(self, args: Any, model_cfg: Any = None) -> Any:
        assert args is self.args
        return types.SimpleNamespace(model=model_cfg)

    def pretrain(
        self,
        cfg_container: Any,
        train_valid_test_dataset_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        model_provider: Any = None,
        process_non_loss_data_func: Any = None,
        get_embedding_ranks: Any = None,
        get_position_embedding_ranks: Any = None,
        non_loss_data_func: Any = None,
        store: Any = None,
        inprocess_call_wrapper: Any = None,
        p2p_communicator: Any = None,
        pg_collection: Any = None,
        skip_model_parallel_init: Any = False,
    ) -> None:
        assert train_valid_test_dataset_provider.is_distributed
        chunks = [built()]
        for hook in cfg_container.model.pre_wrap_hooks:
            chunks = hook(chunks)
        trainer = self.run.train(chunks)
        wrapped: list[Any] = list(trainer.wrapped)
        for hook in cfg_container.model.post_wrap_hooks:
            wrapped = hook(wrapped)
        self.run.load_weights(trainer.chunks)
        self.run.step(trainer, forward_step_func)

    def pretrain_0_18(
        self,
        cfg_container: Any,
        train_valid_test_dataset_provider: Any,
        model_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        process_non_loss_data_func: Any = None,
        get_embedding_ranks: Any = None,
        get_position_embedding_ranks: Any = None,
        non_loss_data_func: Any = None,
        store: Any = None,
        inprocess_call_wrapper: Any = None,
    ) -> None:
        assert train_valid_test_dataset_provider.is_distributed
        trainer = self.run.train([model_provider(pre_process=True, post_process=True)])
        self.run.load_weights(trainer.chunks)
        self.run.step(trainer, forward_step_func)

    def pretrain_0_17(
        self,
        train_valid_test_dataset_provider: Any,
        model_provider: Any,
        model_type: Any,
        forward_step_func: Any,
        process_non_loss_data_func: Any = None,
        extra_args_provider: Any = None,
        args_defaults: Any = None,
        get_embedding_ranks: Any = None,
        get_position_embedding_ranks: Any = None,
        non_loss_data_func: Any = None,
        store: Any = None,
        inprocess_call_wrapper: Any = None,
    ) -> None:
        self.parse_and_validate_args(extra_args_provider, args_defaults=args_defaults)
        self.pretrain_0_18(None, train_valid_test_dataset_provider, model_provider, model_type, forward_step_func)

    def provider(self, model_builder: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`model_provider` of Megatron-LM's checkout: it gives the builder the global arguments."""
        return model_provider(lambda _, *rest, **options: model_builder(self.args, *rest, **options), *args, **kwargs)

    def modules(self, release: str = "0.19") -> Modules:
        pretrain = {"0.19": self.pretrain, "0.18": self.pretrain_0_18, "0.17": self.pretrain_0_17}[release]
        arguments = {} if release == "0.17" else {"parse_and_validate_args": self.parse_and_validate_args}
        return {
            "megatron.training": {"pretrain": pretrain, "get_args": self.get_args, "print_rank_0": print},
            "megatron.training.arguments": arguments,
            "megatron.training.argument_utils": {
                "gpt_config_from_args": self.gpt_config_from_args,
                "pretrain_cfg_container_from_args": self.pretrain_cfg_container_from_args,
            },
            "pretrain_gpt": {
                "forward_step": forward_step,
                "get_embedding_ranks": get_embedding_ranks,
                "train_valid_test_datasets_provider": types.FunctionType(
                    train_valid_test_datasets_provider.__code__, globals()
                ),
            },
            "gpt_builders": {"gpt_builder": gpt_builder},
            "model_provider": {"model_provider": self.provider},
        }


# Megatron-Bridge


class Provider:
    """`ModelProviderMixin` of Megatron-Bridge, and `get_model` of the same module."""

    def __init__(self, run: Run, bridge: types.ModuleType) -> None:
        self.run = run
        self.bridge = bridge
        self._pre_wrap_hooks: list[Hook] = []

    def register_pre_wrap_hook(self, hook: Hook, prepend: bool = False) -> None:
        self._pre_wrap_hooks.insert(0 if prepend else len(self._pre_wrap_hooks), hook)

    @property
    def pre_wrap_hook(self) -> Hook:
        return lambda chunks: functools.reduce(lambda model, hook: hook(model), self._pre_wrap_hooks, chunks)

    def provide_distributed_model(
        self, ddp_config: Any = None, wrap_with_ddp: bool = True, pre_wrap_hook: Any = None, post_wrap_hook: Any = None
    ) -> list[Any]:
        hook = pre_wrap_hook or self.pre_wrap_hook
        model: list[Any] = self.bridge.get_model(
            self, ddp_config=ddp_config, wrap_with_ddp=wrap_with_ddp, pre_wrap_hook=hook
        )
        return model


def get_model(
    model_provider: Provider,
    ddp_config: Any,
    model_type: Any = None,
    wrap_with_ddp: bool = True,
    pre_wrap_hook: Any = None,
    mixed_precision_wrapper: Any = Float16Module,
    *,
    pg_collection: Any = None,
) -> list[Any]:
    chunks = [built()]
    hooks = pre_wrap_hook if isinstance(pre_wrap_hook, list) else [pre_wrap_hook] if pre_wrap_hook else []
    for hook in hooks:
        chunks = hook(chunks) or chunks
    if wrap_with_ddp:
        return list(model_provider.run.train(chunks).wrapped)
    return [mixed_precision_wrapper(chunk.config, chunk) for chunk in chunks]


class Callback:
    def on_train_start(self, context: Any) -> None: ...

    def on_train_step_end(self, context: Any) -> None: ...


class MegatronBridge:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.module = types.ModuleType("megatron.bridge.models.model_provider")
        vars(self.module).update(get_model=get_model)

    def provider(self) -> Provider:
        provider = Provider(self.run, self.module)
        provider.register_pre_wrap_hook(self.run.load_weights)  # as LoRA and AutoBridge do
        return provider

    def configuration(self) -> Any:
        return types.SimpleNamespace(model=self.provider(), checkpoint=self.run.checkpoint, ddp=object())

    def pretrain(
        self, config: Any, forward_step_func: Callable[..., Any], callbacks: list[Callback] | None = None
    ) -> Any:
        wrapped = config.model.provide_distributed_model(ddp_config=config.ddp)
        (trainer,) = self.run.trainers
        self.run.load_weights(trainer.chunks)  # what a checkpoint holds
        context = types.SimpleNamespace(model=wrapped, optimizer=trainer.optimizer, user_state={})
        for callback in callbacks or []:
            callback.on_train_start(context)
        for _ in range(2):
            self.run.step(trainer, functools.partial(forward_step_func, None))
            for callback in callbacks or []:
                callback.on_train_step_end(context)

    @staticmethod
    def forward_step(state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
        return forward_step(data_iterator, model, return_schedule_plan)

    def modules(self) -> Modules:
        return {
            "megatron.bridge.models.model_provider": self.module,
            "megatron.bridge.recipes.qwen": {"qwen3_next_80b_a3b_sft_config": self.configuration},
            "megatron.bridge.training.callbacks": {"Callback": Callback},
            "megatron.bridge.training.gpt_step": {"forward_step": self.forward_step},
            "megatron.bridge.training.pretrain": {"pretrain": self.pretrain},
        }
