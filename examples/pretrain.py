"""Train a model of any supported family with Megatron's own loop, with fp32 logits and fp32 gated-delta-net parameters.

    megatron-fp32 import qwen3_5 imported
    torchrun --nproc-per-node 2 examples/pretrain.py --hf-dir qwen3_5 --load imported --finetune --save run \\
        --tensor-model-parallel-size 2 --sequence-parallel --bf16 --use-distributed-optimizer --mock-data \\
        --seq-length 2048 --max-position-embeddings 2048 --micro-batch-size 1 --global-batch-size 8 \\
        --train-iters 300 --save-interval 150 --lr 1e-4 --no-gradient-accumulation-fusion
    megatron-fp32 export run exported --source imported

`megatron.training` of megatron-core 0.19.2. The model's shapes come from the Hugging Face config, everything else from
Megatron's flags (with Apex, leave the last one out); `--no-fp32-logits` and its like (see --help) choose what is fp32.
Without `--load`, the model starts from random weights. What differs from `pretrain_gpt.py` is in `main`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split
from torch import Tensor

from megatron_fp32 import check_fp32, install_optimizer_repairs
from megatron_fp32.apply import pre_wrap_hook
from megatron_fp32.config import Fp32Config
from megatron_fp32.models.flags import add_fp32_arguments, fp32_config_from_args
from megatron_fp32.models.provider import drop_unread_head, read_hf_config
from megatron_fp32.models.specs import decoder_block_spec, mtp_block_spec


def main() -> None:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--hf-dir", required=True)
    known, flags = own.parse_known_args()
    sys.argv[1:] = [*read_hf_config(known.hf_dir).megatron_arguments(), *flags]
    args = parse_and_validate_args(
        extra_args_provider=add_fp32_arguments, args_defaults={"tokenizer_type": "NullTokenizer"}
    )

    if args.context_parallel_size > 1:
        raise ValueError(
            f"forward_step does not slice batches for context parallelism, got {args.context_parallel_size}"
        )

    fp32 = fp32_config_from_args(args)
    model = gpt_config_from_args(args)
    # Parameters are fp32 from their construction on; the output layer is changed before the model is wrapped.
    model.transformer_layer_spec = lambda config, vp_stage: decoder_block_spec(
        config.transformer, fp32, vp_stage=vp_stage
    )
    model.pre_wrap_hooks += [without_unread_heads, pre_wrap_hook(fp32, weights="initialized")]
    model.post_wrap_hooks.append(functools.partial(checked, fp32=fp32))
    with install_optimizer_repairs(), compiled_helpers(), attention_in_mtp():
        pretrain(
            pretrain_cfg_container_from_args(args, model),
            datasets,
            ModelType.encoder_or_decoder,
            functools.partial(forward_step, fp32=fp32),
        )


def compiled_helpers() -> contextlib.AbstractContextManager[Any]:
    """`pretrain` runs make for the dataset helpers. The wheel brings them compiled, without the Makefile."""
    from megatron.core.datasets import utils

    if (Path(utils.__file__).parent / "Makefile").exists():
        return contextlib.nullcontext()
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    return mock.patch.object(utils, "compile_helpers")


def attention_in_mtp() -> contextlib.AbstractContextManager[Any]:
    """megatron.training 0.19.2 makes no MTP layer for models with gated delta nets; the package does."""
    from megatron.training.models import gpt

    def spec(config: Any, decoder: Any, vp_stage: int | None = None) -> Any:
        return mtp_block_spec(config.transformer, vp_stage=vp_stage) if config.transformer.mtp_num_layers else None

    return mock.patch.object(gpt, "mtp_block_spec", spec)


def without_unread_heads(chunks: list[Any]) -> list[Any]:
    for chunk in chunks:
        drop_unread_head(chunk)
    return chunks


def checked(chunks: list[Any], *, fp32: Fp32Config) -> list[Any]:
    check_fp32(chunks, fp32)
    return chunks


def forward_step(data: Iterator[dict[str, Tensor]], model: Any, *, fp32: Fp32Config) -> tuple[Tensor, Any]:
    batch = {name: tensor.cuda(non_blocking=True) for name, tensor in next(data).items()}
    losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"])
    args = get_args()
    if args.curr_iteration == args.iteration:  # the first of this run
        check_fp32(model, fp32, after_forward=True)
    return losses, functools.partial(loss, batch["loss_mask"])


def loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    total = (losses.float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def datasets(samples: list[int], vp_stage: int | None = None) -> Any:
    """Train, validation and test sets; every rank builds them, so that nothing has to be broadcast."""
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        path_to_cache=args.data_cache_path,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, lambda: True, config).build()


datasets.is_distributed = True


if __name__ == "__main__":
    main()
