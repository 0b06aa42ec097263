"""A model provider for slime, with fp32 logits and fp32 gated-delta-net parameters.

Where to put it: a folder that is on the `PYTHONPATH` of the Ray job, which must also name megatron_fp32 if that is not
installed.

Launch: the two `--custom-...` lines and the `--sglang-...` line are added to a script such as
`scripts/run-qwen3.5-35B-A3B-sft.sh` or `scripts/run-qwen3-4B.sh`:

    ray job submit --address http://127.0.0.1:8265 \\
        --runtime-env-json '{"env_vars": {"PYTHONPATH": "path/to/Megatron-LM:path/to/this/folder"}}' \\
        -- python3 train.py \\
        --custom-model-provider-path slime_fp32.model_provider \\
        --custom-megatron-before-train-step-hook-path slime_fp32.check_before_step \\
        --sglang-enable-fp32-lm-head \\
        ${MODEL_ARGS[@]} ${CKPT_ARGS[@]} ...

Convert the Hugging Face weights with the same provider, so that `A_log` is not rounded on the way:

    PYTHONPATH=path/to/Megatron-LM:path/to/this/folder python tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]} \\
        --hf-checkpoint HF_DIR --save TORCH_DIST --custom-model-provider-path slime_fp32.model_provider

Save and resume with slime's own `--save`, `--save-interval` and `--load`.

Read at v0.3.1 and main (624b824a8) of THUDM/slime: `slime/backends/megatron_utils/{model_provider,model}.py`,
`slime_plugins/models/qwen3_5.py`, `tools/convert_hf_to_torch_dist.py`, `docs/en/get_started/customization.md`.
"""

import copy

from megatron.training import get_args, print_rank_0
from slime.backends.megatron_utils.model_provider import _get_model_provider_func

from megatron_fp32 import (
    Fp32Config,
    Fp32GatedDeltaNet,
    apply_fp32,
    check_fp32,
    install_optimizer_repairs,
    keep_in_fp32,
)

FP32 = Fp32Config()  # logits, A_log and out_norm


def model_provider(pre_process=True, post_process=True, vp_stage=None):
    """The model that slime builds without `--custom-model-provider-path`, and then changed.

    slime replaces the output layer of a critic by its value head afterwards; nothing has to be done for that.
    """
    args = copy.copy(get_args())
    args.custom_model_provider_path = None  # otherwise slime would call this function again
    model = _get_model_provider_func(args)(pre_process, post_process, vp_stage)
    print_rank_0(apply_fp32(model, FP32, weights="initialized"))
    # slime's own layers for Qwen3.5 and Qwen3-Next are not megatron-core's GatedDeltaNet. They compute with
    # A_log.float(), so A_log can stay fp32; their norm is left as it is.
    for layer in model.modules():
        if hasattr(layer, "A_log") and not isinstance(layer, Fp32GatedDeltaNet):
            keep_in_fp32(layer, "A_log")
    install_optimizer_repairs()  # the optimizer is built next; for the rest of the process, on every rank
    return model


def check_before_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    """Raise unless the model and its optimizer are in fp32 as configured; before every training step."""
    check_fp32(model, FP32, optimizer=optimizer, after_forward=step_id > 0)
