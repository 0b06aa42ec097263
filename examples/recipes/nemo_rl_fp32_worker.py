"""The Megatron policy worker of NeMo-RL, with fp32 logits and fp32 gated-delta-net parameters.

`nemo_rl_fp32.py` says where to put this file and how to launch. NeMo-RL builds three models in a worker: one to convert
the Hugging Face weights, the policy, and the reference policy. Each of them must be changed before its weights are
loaded: a value that was rounded once stays rounded. All three are built by `get_model` of Megatron-Bridge, so the hook
is put in front of its hooks while the worker starts.

Read at v0.7.0 and main (7ea279abf) of NVIDIA-NeMo/RL: `nemo_rl/models/megatron/{setup,community_import}.py`,
`nemo_rl/models/policy/workers/megatron_policy_worker.py`; and at main (067f987df) of NVIDIA-NeMo/Megatron-Bridge:
`src/megatron/bridge/models/model_provider.py`.
"""

import contextlib
from unittest import mock

import ray
from megatron.bridge.models import model_provider
from nemo_rl.models.megatron import setup
from nemo_rl.models.policy.utils import get_runtime_env_for_policy_worker
from nemo_rl.models.policy.workers.megatron_policy_worker import MegatronPolicyWorkerImpl

from megatron_fp32 import Fp32Config, check_fp32, pre_wrap_hook

FP32 = Fp32Config()  # logits, A_log and out_norm


class Fp32PolicyWorkerImpl(MegatronPolicyWorkerImpl):
    """The worker, without Ray."""

    def __init__(self, *args, **kwargs):
        with first_hook(pre_wrap_hook(FP32, weights="initialized")):  # also installs the optimizer repairs
            super().__init__(*args, **kwargs)
        if getattr(self, "_colocated_reshard_plan", None) is not None:
            raise ValueError(
                "generation with the Megatron backend in another layout than training builds a sampler without fp32 "
                "logits: expected the same layout, or policy.generation.backend=vllm"
            )
        check_fp32(self.model, FP32, optimizer=self.optimizer)

    def train(self, *args, **kwargs):
        """See `MegatronPolicyWorkerImpl.train`."""
        result = super().train(*args, **kwargs)
        check_fp32(self.model, FP32, optimizer=self.optimizer, after_forward=True)
        return result


@contextlib.contextmanager
def first_hook(hook):
    """Let every `get_model` inside the block run `hook` before the hooks that it is given."""
    stock = model_provider.get_model

    def get_model(*args, pre_wrap_hook=None, **kwargs):
        others = pre_wrap_hook if isinstance(pre_wrap_hook, list) else [pre_wrap_hook] if pre_wrap_hook else []
        return stock(*args, pre_wrap_hook=[hook, *others], **kwargs)

    # NeMo-RL has imported the function by name.
    with mock.patch.object(model_provider, "get_model", get_model), mock.patch.object(setup, "get_model", get_model):
        yield


@ray.remote(runtime_env=get_runtime_env_for_policy_worker("megatron_policy_worker"))
class Fp32PolicyWorker(Fp32PolicyWorkerImpl):
    """The worker as a Ray actor."""
