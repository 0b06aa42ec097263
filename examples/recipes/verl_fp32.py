"""A Megatron engine for verl, with fp32 logits and fp32 gated-delta-net parameters.

Where to put it: a folder that is on `PYTHONPATH` on every node. verl imports it because `external_lib` names it, in the
driver and in every worker.

Launch: these lines are added to a script such as `examples/grpo_trainer/run_qwen3_5_35b_megatron.sh`:

    PYTHONPATH=path/to/this/folder python3 -m verl.trainer.main_ppo model_engine=megatron \\
        actor_rollout_ref.model.external_lib=verl_fp32 \\
        actor_rollout_ref.model.use_fused_kernels=False \\
        +actor_rollout_ref.rollout.engine_kwargs.vllm.hf_overrides.head_dtype=float32 \\
        ...

The last line is the sampler's half. With `actor_rollout_ref.rollout.name=sglang` it is
`+actor_rollout_ref.rollout.engine_kwargs.sglang.enable_fp32_lm_head=True`. Save and resume with verl's own
`trainer.save_freq` and `trainer.resume_mode`.

Read at v0.9.0 and main (1dda039b9) of verl-project/verl: `verl/workers/engine/base.py`,
`verl/workers/engine/megatron/transformer_impl.py`, `verl/utils/megatron_utils.py`, `verl/workers/config/model.py`,
`verl/workers/rollout/*/`. It needs Megatron-Bridge, verl's default: `vanilla_mbridge=False`.
"""

from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.megatron.transformer_impl import MegatronEngineWithLMHead

from megatron_fp32 import Fp32Config, check_fp32, pre_wrap_hook

FP32 = Fp32Config()  # logits, A_log and out_norm


# verl registers its own engine for "cuda" without a vendor. An engine with a vendor is looked up first.
@EngineRegistry.register(model_type="language_model", backend="megatron", device="cuda", vendor="nvidia")
class Fp32MegatronEngine(MegatronEngineWithLMHead):
    """verl's engine for language models; actor and reference policy use it, a critic does not."""

    def _build_tf_config(self):
        super()._build_tf_config()
        if self.provider is None:
            raise ValueError("expected Megatron-Bridge (vanilla_mbridge=False), got the legacy mbridge")
        # First of all hooks, before LoRA's. The weights are loaded later. It also installs the optimizer repairs.
        self.provider.register_pre_wrap_hook(pre_wrap_hook(FP32, weights="initialized"), prepend=True)

    def initialize(self):
        """Build the model, load its weights, build the optimizer, and check all of it."""
        super().initialize()
        check_fp32(self.module, FP32, optimizer=self.optimizer)

    def optimizer_step(self):
        """Check that the fp32 layers computed this batch, and then step."""
        check_fp32(self.module, FP32, optimizer=self.optimizer, after_forward=True)
        return super().optimizer_step()
