"""Pretrain or fine-tune with Megatron-LM 0.19, with fp32 logits and fp32 gated-delta-net parameters.

This script takes the place of `pretrain_gpt.py`: it imports the data sets and the forward step from there, and calls
the same `pretrain()`. It accepts every flag of `pretrain_gpt.py`, and the flags of megatron_fp32: `--no-fp32-logits`,
`--fp32-logits-grad-precision`, `--fp32-logits-invariant`, `--fp32-fused-loss`, `--fp32-vocab-size` and
`--fp32-gated-delta-net`. Without them, the logits, `A_log` and `out_norm` are fp32.

Where to put it: anywhere. `PYTHONPATH` must name the Megatron-LM checkout, because `pretrain_gpt` is imported from it.

Launch on one node (on more, add `--nnodes`, `--node-rank` and `--rdzv-endpoint`):

    megatron-fp32 import path/to/hf_model imported
    PYTHONPATH=path/to/Megatron-LM torchrun --nproc-per-node 8 megatron_lm_fp32.py \\
        --load imported --finetune --save run --save-interval 500 ...the flags that you pass to pretrain_gpt.py...

Resume: pass `--load run` and leave out `--finetune`. To train from random weights, leave out `--load` at the start.
Back to Hugging Face: `megatron-fp32 export run exported --source imported`.

Read at core_v0.19.0 of NVIDIA/Megatron-LM: `pretrain_gpt.py`, `megatron/training/argument_utils.py`,
`megatron/training/models/base.py`, and in the wheel of megatron-core 0.19.2. For 0.16 to 0.18 use
`megatron_lm_0_18_fp32.py`.
"""

import functools

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from pretrain_gpt import forward_step, get_embedding_ranks, train_valid_test_datasets_provider

from megatron_fp32 import add_fp32_arguments, check_fp32, fp32_config_from_args, pre_wrap_hook


def main() -> None:
    args = parse_and_validate_args(
        extra_args_provider=add_fp32_arguments, args_defaults={"tokenizer_type": "GPT2BPETokenizer"}
    )
    fp32 = fp32_config_from_args(args)
    model = gpt_config_from_args(args)
    # Megatron runs these hooks before Float16Module and DDP, and loads --load after them. The hook also installs the
    # optimizer repairs, without which released optimizers cannot save fp32 parameters of a bf16 model.
    model.pre_wrap_hooks.append(pre_wrap_hook(fp32, weights="initialized"))
    model.post_wrap_hooks.append(functools.partial(checked, fp32))
    train_valid_test_datasets_provider.is_distributed = True
    pretrain(
        pretrain_cfg_container_from_args(args, model),
        train_valid_test_datasets_provider,
        ModelType.encoder_or_decoder,
        CheckedForwardStep(fp32),
        get_embedding_ranks=get_embedding_ranks,
    )


def checked(fp32, chunks):
    """Raise unless the wrapped chunks hold in fp32 what `fp32` asks for."""
    check_fp32(chunks, fp32)
    return chunks


class CheckedForwardStep:
    """`forward_step` of `pretrain_gpt.py`, with a check after the first pass of each model chunk."""

    def __init__(self, fp32):
        self.fp32 = fp32
        self.seen = set()

    def __call__(self, data_iterator, model, return_schedule_plan=False):
        """See `pretrain_gpt.forward_step`."""
        output = forward_step(data_iterator, model, return_schedule_plan)
        if not return_schedule_plan and id(model) not in self.seen:
            self.seen.add(id(model))
            check_fp32(model, self.fp32, after_forward=True)
        return output


if __name__ == "__main__":
    main()
