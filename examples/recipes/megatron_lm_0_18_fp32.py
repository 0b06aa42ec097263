"""Pretrain or fine-tune with Megatron-LM 0.16, 0.17 or 0.18, with fp32 logits and fp32 gated-delta-net parameters.

This script takes the place of `pretrain_gpt.py`: it imports the data sets, the model builder and the forward step from
the Megatron-LM checkout and calls the same `pretrain()`. In these releases the model provider is the place where a
GPTModel is built, so `apply_fp32` is called there.

Where to put it: anywhere. `PYTHONPATH` must name the Megatron-LM checkout.

Launch on one node (on more, add `--nnodes`, `--node-rank` and `--rdzv-endpoint`):

    megatron-fp32 import path/to/hf_model imported
    PYTHONPATH=path/to/Megatron-LM torchrun --nproc-per-node 8 megatron_lm_0_18_fp32.py \\
        --load imported --finetune --save run --save-interval 500 ...the flags that you pass to pretrain_gpt.py...

Resume: pass `--load run` and leave out `--finetune`. To train from random weights, leave out `--load` at the start.
Back to Hugging Face: `megatron-fp32 export run exported --source imported`.

Read at core_v0.16.1, core_v0.17.1 and core_v0.18.2 of NVIDIA/Megatron-LM: `pretrain_gpt.py`, `gpt_builders.py`,
`model_provider.py`, `megatron/training/training.py`.
"""

import functools

from gpt_builders import gpt_builder
from megatron.core.enums import ModelType
from megatron.training import arguments, get_args, pretrain, print_rank_0
from model_provider import model_provider
from pretrain_gpt import forward_step, get_embedding_ranks, train_valid_test_datasets_provider

from megatron_fp32 import (
    add_fp32_arguments,
    apply_fp32,
    check_fp32,
    fp32_config_from_args,
    install_optimizer_repairs,
)


def main() -> None:
    train_valid_test_datasets_provider.is_distributed = True
    provider = functools.partial(model_provider, fp32_gpt_builder)
    defaults = {"tokenizer_type": "GPT2BPETokenizer"}
    # Without the repairs, the optimizers of these releases cannot save fp32 parameters of a bf16 model.
    with install_optimizer_repairs():
        if hasattr(arguments, "parse_and_validate_args"):  # 0.18 parses before pretrain()
            from megatron.training.argument_utils import pretrain_cfg_container_from_args

            args = arguments.parse_and_validate_args(extra_args_provider=add_fp32_arguments, args_defaults=defaults)
            pretrain(
                pretrain_cfg_container_from_args(args),
                train_valid_test_datasets_provider,
                provider,
                ModelType.encoder_or_decoder,
                CheckedForwardStep(),
                get_embedding_ranks=get_embedding_ranks,
            )
        else:
            pretrain(
                train_valid_test_datasets_provider,
                provider,
                ModelType.encoder_or_decoder,
                CheckedForwardStep(),
                extra_args_provider=add_fp32_arguments,
                args_defaults=defaults,
                get_embedding_ranks=get_embedding_ranks,
            )


def fp32_gpt_builder(args, pre_process, post_process, vp_stage=None, config=None, pg_collection=None):
    """`gpt_builder` of Megatron-LM, and then `apply_fp32`: before weights are loaded, Float16Module and DDP."""
    model = gpt_builder(args, pre_process, post_process, vp_stage, config=config, pg_collection=pg_collection)
    print_rank_0(apply_fp32(model, fp32_config_from_args(args), weights="initialized"))
    return model


class CheckedForwardStep:
    """`forward_step` of `pretrain_gpt.py`, with a check after the first pass of each model chunk."""

    def __init__(self):
        self.seen = set()

    def __call__(self, data_iterator, model, return_schedule_plan=False):
        """See `pretrain_gpt.forward_step`."""
        output = forward_step(data_iterator, model, return_schedule_plan)
        if not return_schedule_plan and id(model) not in self.seen:
            self.seen.add(id(model))
            check_fp32(model, fp32_config_from_args(get_args()), after_forward=True)
        return output


if __name__ == "__main__":
    main()
