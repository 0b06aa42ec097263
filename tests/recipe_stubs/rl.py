"""NeMo-RL, slime and verl."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from tests.recipe_stubs.common import BATCH, Modules, Run, built
from tests.recipe_stubs.megatron import MegatronBridge, MegatronLM, get_model

# NeMo-RL


class NemoRL:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.bridge = MegatronBridge(run)
        self.setup = types.ModuleType("nemo_rl.models.megatron.setup")
        vars(self.setup).update(get_model=get_model)
        self.lm_policy = types.ModuleType("nemo_rl.models.policy.lm_policy")
        vars(self.lm_policy).update(resolve_policy_worker_cls=lambda default_cls, config: default_cls)
        self.registry = {"nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker": "uv run mcore"}
        self.colocated_reshard_plan: Any = None

    def worker(nemo: NemoRL) -> type:
        class MegatronPolicyWorkerImpl:
            def __init__(
                self,
                config: Any,
                tokenizer: Any,
                weights_path: str | None = None,
                optimizer_path: str | None = None,
                init_optimizer: bool = True,
                init_reference_model: bool = True,
                *,
                worker_sharding_annotations: Any,
                skip_weight_load: bool = False,
                **kwargs: Any,
            ) -> None:
                run = nemo.run
                # The Hugging Face weights are converted: the bridge's hook loads them into a model of their own.
                nemo.bridge.provider().provide_distributed_model(wrap_with_ddp=False)
                # The policy: the hook of PEFT loads weights, without PEFT they come after the wrap.
                hooks = [run.load_weights]
                (self.model,) = nemo.setup.get_model(nemo.bridge.provider(), object(), pre_wrap_hook=hooks)
                (trainer,) = run.trainers
                run.load_weights(trainer.chunks)
                self.optimizer = trainer.optimizer
                # The reference policy, whose weights the worker keeps as a state dict.
                (reference,) = nemo.setup.get_model(
                    nemo.bridge.provider(), object(), pre_wrap_hook=[], wrap_with_ddp=False
                )
                run.load_weights([reference.module])
                self._colocated_reshard_plan = nemo.colocated_reshard_plan

            def train(
                self,
                data: Any,
                loss_fn: Any,
                eval_mode: bool = False,
                gbs: int | None = None,
                mbs: int | None = None,
                check_dim_skip_keys: Any = None,
            ) -> dict[str, Any]:
                nemo.run.step(nemo.run.trainers[0])
                return {"loss": 0.0}

        return MegatronPolicyWorkerImpl

    def modules(self) -> Modules:
        def remote(**options: Any) -> Callable[[type], type]:
            return lambda actor: actor

        return self.bridge.modules() | {
            "ray": {"remote": remote},
            "nemo_rl.distributed.ray_actor_environment_registry": {"ACTOR_ENVIRONMENT_REGISTRY": self.registry},
            "nemo_rl.models.megatron.setup": self.setup,
            "nemo_rl.models.policy.lm_policy": self.lm_policy,
            "nemo_rl.models.policy.utils": {"get_runtime_env_for_policy_worker": lambda policy_worker_name: {}},
            "nemo_rl.models.policy.workers.megatron_policy_worker": {"MegatronPolicyWorkerImpl": self.worker()},
        }


# slime


class SlimeGatedDeltaNet(torch.nn.Module):
    """`Qwen3_5GatedDeltaNet` of slime, which is not megatron-core's."""

    def __init__(self) -> None:
        super().__init__()
        self.A_log = torch.nn.Parameter(torch.empty(4).uniform_(0, 16).log())
        self.dt_bias = torch.nn.Parameter(torch.ones(4))


class Slime:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.megatron = MegatronLM(run)

    @staticmethod
    def _get_model_provider_func(args: Any, role: str = "actor") -> Any:
        assert args.custom_model_provider_path is None, "it would call itself"

        def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None) -> Any:
            model = built(pre_process, post_process, vp_stage)
            model.decoder.layers[1].linear_attn = SlimeGatedDeltaNet()
            return model

        return model_provider

    def train(self, provider: Callable[..., Any], before_step: Callable[..., None]) -> None:
        """What `initialize_model_and_optimizer` and two training steps of slime do."""
        trainer = self.run.train([provider(pre_process=True, post_process=True, vp_stage=None)])
        self.run.load_weights(trainer.chunks)
        for step in range(2):
            before_step(self.megatron.args, 0, step, trainer.wrapped, trainer.optimizer, None)
            trainer.backward([BATCH])  # the stand-in layer is in no forward pass
            self.run.steps += 1

    def modules(self) -> Modules:
        return self.megatron.modules() | {
            "slime.backends.megatron_utils.model_provider": {"_get_model_provider_func": self._get_model_provider_func}
        }


# verl


class EngineRegistry:
    """Of verl."""

    def __init__(self) -> None:
        self._engines: dict[tuple[str, str], dict[Any, type]] = {}

    def register(self, model_type: str, backend: Any, device: Any = "cuda", vendor: Any = None) -> Any:
        def decorator(engine_class: type) -> type:
            registered = self._engines.setdefault((model_type, backend), {})
            key = (device, vendor) if vendor else device
            assert key not in registered
            registered[key] = engine_class
            return engine_class

        return decorator

    def get_engine_cls(self, model_type: str, backend: str) -> type:
        registered = self._engines[model_type, backend]
        return registered.get(("cuda", "nvidia")) or registered["cuda"]


class Verl:
    def __init__(self, run: Run) -> None:
        self.run = run
        self.bridge = MegatronBridge(run)
        self.registry = EngineRegistry()
        self.vanilla_mbridge = False
        self.engine = self.registry.register(model_type="language_model", backend="megatron")(self.stock_engine())

    def stock_engine(verl: Verl) -> type:
        class MegatronEngineWithLMHead:
            def _build_tf_config(self) -> None:
                self.provider = None if verl.vanilla_mbridge else verl.bridge.provider()

            def initialize(self) -> None:
                self._build_tf_config()
                self.module = self.provider.provide_distributed_model(wrap_with_ddp=True)
                (self.trainer,) = verl.run.trainers
                verl.run.load_weights(self.trainer.chunks)
                self.optimizer = self.trainer.optimizer

            def optimizer_step(self) -> float:
                self.trainer.optimizer.step()
                verl.run.steps += 1
                return 0.0

        return MegatronEngineWithLMHead

    def modules(self) -> Modules:
        return {
            "verl.workers.engine.base": {"EngineRegistry": self.registry},
            "verl.workers.engine.megatron.transformer_impl": {"MegatronEngineWithLMHead": self.engine},
        }
