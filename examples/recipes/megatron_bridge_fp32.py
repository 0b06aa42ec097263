"""Fine-tune Qwen3-Next with Megatron-Bridge, with fp32 logits and fp32 gated-delta-net parameters.

Where to put it: anywhere, in an environment that has megatron_fp32 and Megatron-Bridge.

Launch, on each of two nodes of 8 GPUs, which is what this configuration is made for:

    torchrun --nnodes 2 --node-rank RANK --rdzv-endpoint HOST:29500 --rdzv-backend c10d --nproc-per-node 8 \\
        megatron_bridge_fp32.py --hf-dir path/to/Qwen3-Next-80B-A3B-Instruct --save run

`--hf-dir` is a local Hugging Face directory. Megatron-Bridge loads it into the model that the hook has changed, so
`A_log` arrives in fp32. Do not start from a Megatron checkpoint that `scripts/import_hf_ckpt.py` of Megatron-Bridge has
written: that checkpoint holds `A_log` rounded to bf16.

Resume: run the same command. What `--save` holds is loaded, and wins over `--hf-dir`. For another model take another
configuration function of `megatron.bridge.recipes`; for random weights leave out `--hf-dir` and call a
`..._pretrain_config`.

Read at v0.6.0 and main (067f987df) of NVIDIA-NeMo/Megatron-Bridge: `src/megatron/bridge/models/model_provider.py`,
`src/megatron/bridge/training/{setup,pretrain,callbacks,checkpointing}.py`.
"""

import argparse

from megatron.bridge.recipes.qwen import qwen3_next_80b_a3b_sft_config
from megatron.bridge.training.callbacks import Callback
from megatron.bridge.training.gpt_step import forward_step
from megatron.bridge.training.pretrain import pretrain

from megatron_fp32 import Fp32Config, check_fp32, pre_wrap_hook

FP32 = Fp32Config()  # logits, A_log and out_norm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-dir", help="a local Hugging Face directory; without it, the weights stay random")
    parser.add_argument("--save", required=True, help="where checkpoints are written, and from where a run resumes")
    args = parser.parse_args()

    cfg = qwen3_next_80b_a3b_sft_config()
    cfg.checkpoint.pretrained_checkpoint = args.hf_dir
    cfg.checkpoint.save = cfg.checkpoint.load = args.save
    # First of all hooks: those of LoRA and of AutoBridge load weights. The hook also installs the optimizer repairs.
    cfg.model.register_pre_wrap_hook(pre_wrap_hook(FP32, weights="initialized"), prepend=True)
    pretrain(cfg, forward_step, callbacks=[Fp32Check()])


class Fp32Check(Callback):
    """Checks the wrapped model and its optimizer before the first step, and that the fp32 layers ran after it."""

    def on_train_start(self, context) -> None:
        """Called when the model is wrapped, its weights are loaded and the optimizer is built."""
        check_fp32(context.model, FP32, optimizer=context.optimizer)

    def on_train_step_end(self, context) -> None:
        """Called after every step; looks once."""
        if not context.user_state.get("fp32_checked"):
            check_fp32(context.model, FP32, optimizer=context.optimizer, after_forward=True)
            context.user_state["fp32_checked"] = True


if __name__ == "__main__":
    main()
