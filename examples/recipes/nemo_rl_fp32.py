"""Run a training script of NeMo-RL with the Megatron policy worker of `nemo_rl_fp32_worker.py`.

Where to put it: a folder that is on `PYTHONPATH`, together with `nemo_rl_fp32_worker.py`; NeMo-RL passes `PYTHONPATH`
on to its Ray workers. The environment of the Megatron worker must have megatron_fp32: install it there, or add its
checkout to `PYTHONPATH` as well.

Launch, from the NeMo-RL checkout:

    export PYTHONPATH=path/to/this/folder:path/to/megatron_fp32
    uv run path/to/this/folder/nemo_rl_fp32.py examples/run_grpo.py --config examples/configs/grpo_math_1B.yaml \\
        policy.model_name=Qwen/Qwen3-Next-80B-A3B-Instruct \\
        policy.dtensor_cfg.enabled=false policy.megatron_cfg.enabled=true \\
        policy.megatron_cfg.force_reconvert_from_hf=true \\
        +policy.hf_config_overrides.head_dtype=float32

The last line is the sampler's half: vLLM then computes fp32 logits too. `force_reconvert_from_hf=true` is needed once,
because NeMo-RL keeps the converted weights in a cache, and an earlier run has rounded `A_log` there. Save and resume
with NeMo-RL's own `checkpointing.enabled=true`.

Read at v0.7.0 and main (7ea279abf) of NVIDIA-NeMo/RL: `nemo_rl/models/policy/lm_policy.py`,
`nemo_rl/distributed/ray_actor_environment_registry.py`, `nemo_rl/algorithms/grpo.py`, `examples/run_grpo.py`.
"""

import runpy
import sys
from unittest import mock

from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
from nemo_rl.models.policy import lm_policy

STOCK_WORKER = "nemo_rl.models.policy.workers.megatron_policy_worker.MegatronPolicyWorker"
FP32_WORKER = "nemo_rl_fp32_worker.Fp32PolicyWorker"


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit(f"expected a script of NeMo-RL, such as examples/run_grpo.py\n\n{__doc__}")
    # The worker runs in the Python environment of NeMo-RL's own Megatron worker.
    ACTOR_ENVIRONMENT_REGISTRY[FP32_WORKER] = ACTOR_ENVIRONMENT_REGISTRY[STOCK_WORKER]
    stock = lm_policy.resolve_policy_worker_cls

    def resolve(default_cls, config):
        found = stock(default_cls, config)
        return FP32_WORKER if found == STOCK_WORKER else found

    sys.argv = sys.argv[1:]
    with mock.patch.object(lm_policy, "resolve_policy_worker_cls", resolve):
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
