"""Train a model of any supported family with Megatron's own loop, with fp32 logits and fp32 gated-delta-net parameters.

The shapes of the model come from the `config.json` in --hf-dir, everything else from Megatron's flags. It needs
`megatron.training` of megatron-core 0.19 (Python 3.12: pip install 'megatron_fp32[megatron]') and GPUs.

Start from a Hugging Face model, on one node of 8 GPUs, on your data. --data-path takes the common prefix of a .bin and
an .idx file, as Megatron's tools/preprocess_data.py writes them, or several of them with weights:

    megatron-fp32 import path/to/hf_model imported
    torchrun --nproc-per-node 8 examples/pretrain.py --hf-dir path/to/hf_model \\
        --load imported --finetune --save run --save-interval 500 \\
        --data-path path/to/data_text_document --split 990,8,2 \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/hf_model \\
        --tensor-model-parallel-size 2 --sequence-parallel --bf16 --use-distributed-optimizer \\
        --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 --global-batch-size 64 \\
        --train-iters 10000 --lr 1e-5 --no-gradient-accumulation-fusion

Resume: the same command with `--load run` in place of `--load imported --finetune`. It continues with the optimizer's
state and with the data that has not been seen. A run with random weights starts without --load.

On two nodes, run this on each, with RANK 0 and 1 and HOST the name of the first node. All nodes must see --save:

    torchrun --nnodes 2 --node-rank RANK --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 \\
        examples/pretrain.py ...the same flags...

Without data, to try it: `--mock-data` in place of --data-path, --split and the two tokenizer flags.

Back to Hugging Face: megatron-fp32 export run exported --source imported

With Apex, leave out --no-gradient-accumulation-fusion. What differs from Megatron-LM's pretrain_gpt.py is in `main`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_fp32 import (
    Fp32Config,
    add_fp32_arguments,
    check_fp32,
    fp32_config_from_args,
    install_optimizer_repairs,
    pre_wrap_hook,
)
from megatron_fp32.models.provider import drop_unread_head, read_hf_config
from megatron_fp32.models.specs import decoder_block_spec, mtp_block_spec


def main() -> None:
    args = parse(sys.argv[1:])
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    fp32 = fp32_config_from_args(args)
    built_datasets = functools.partial(datasets, args)
    built_datasets.is_distributed = True  # type: ignore[attr-defined]
    with install_optimizer_repairs(), compiled_helpers(), attention_in_mtp():
        pretrain(
            pretrain_cfg_container_from_args(args, model_config(args, fp32)),
            built_datasets,
            ModelType.encoder_or_decoder,
            ForwardStep(fp32),
        )


# Arguments


def parse(flags: Sequence[str]) -> argparse.Namespace:
    """Megatron's arguments, with the model's shapes from --hf-dir.

    Raises:
        SystemExit: for --help, without a suitable megatron-core, or for wrong flags.
        ValueError: for context parallelism, and for a model that Megatron's flags cannot describe.
    """
    own = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, add_help=False
    )
    own.add_argument("-h", "--help", action="store_true", help="show this text and Megatron's flags, and exit")
    own.add_argument("--hf-dir", metavar="DIR", help="the Hugging Face directory of the model (required)")
    known, rest = own.parse_known_args(flags)
    if known.help:
        print_help(add_fp32_arguments(own))
        raise SystemExit(0)
    if known.hf_dir is None:
        own.error("--hf-dir is required: the Hugging Face directory with the model's config.json")
    need_megatron_training()
    from megatron.training.arguments import parse_and_validate_args

    try:
        model = read_hf_config(known.hf_dir)
    except FileNotFoundError as error:
        own.error(f"--hf-dir: {error}")
    with mock.patch.object(sys, "argv", [sys.argv[0], *model.megatron_arguments(), *rest]):
        # Without an interval of evaluation, megatron.training 0.19.2 fails when it counts samples.
        args = parse_and_validate_args(
            extra_args_provider=add_fp32_arguments,
            args_defaults={"tokenizer_type": "NullTokenizer", "eval_interval": 1000},
        )
    if args.context_parallel_size > 1:
        raise ValueError(
            f"forward_step does not slice batches for context parallelism: expected --context-parallel-size 1, got "
            f"{args.context_parallel_size}"
        )
    return args


def need_megatron_training() -> None:
    """Exit with a sentence unless megatron-core brings what this script is made of."""
    try:
        found = hasattr(importlib.import_module("megatron.training.argument_utils"), "gpt_config_from_args")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("megatron"):
            raise
        found = False
    if not found:
        from megatron.core.package_info import __version__ as version

        raise SystemExit(
            "examples/pretrain.py needs megatron.training of megatron-core 0.19 or newer, and Python 3.12 or newer; "
            f"found megatron-core {version} with Python {sys.version_info.major}.{sys.version_info.minor}. For "
            "Megatron-LM 0.16 to 0.18 see examples/recipes/megatron_lm_0_18_fp32.py"
        )


class _Formatter(argparse.HelpFormatter):
    """Megatron 0.19.2 has help texts with a bare % sign, on which argparse's own formatter fails."""

    def _expand_help(self, action: argparse.Action) -> str:
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return action.help or ""


def print_help(own: argparse.ArgumentParser) -> None:
    """This script's flags, and Megatron's where megatron.training is installed."""
    own.print_help()
    try:
        from megatron.training.arguments import add_megatron_arguments
    except ModuleNotFoundError as error:
        print(f"\nMegatron's own flags are not shown: {error}")
        return
    megatron = argparse.ArgumentParser(formatter_class=_Formatter, add_help=False, usage=argparse.SUPPRESS)
    print("\nMegatron's own flags:\n")
    add_megatron_arguments(megatron).print_help()


# The model


def model_config(args: argparse.Namespace, fp32: Fp32Config) -> Any:
    """Megatron's model configuration (`GPTModelConfig`), whose hooks make the model fp32 and check it."""
    from megatron.training.argument_utils import gpt_config_from_args

    model = gpt_config_from_args(args)
    # Parameters are fp32 from their construction on; the output layer is changed before the model is wrapped.
    model.transformer_layer_spec = lambda config, vp_stage: decoder_block_spec(
        config.transformer, fp32, vp_stage=vp_stage
    )
    model.pre_wrap_hooks += [without_unread_heads, pre_wrap_hook(fp32, weights="initialized")]
    model.post_wrap_hooks.append(functools.partial(checked, fp32=fp32))
    return model


def without_unread_heads(chunks: list[Any]) -> list[Any]:
    for chunk in chunks:
        drop_unread_head(chunk)
    return chunks


def checked(chunks: list[Any], *, fp32: Fp32Config) -> list[Any]:
    check_fp32(chunks, fp32)
    return chunks


def attention_in_mtp() -> contextlib.AbstractContextManager[Any]:
    """megatron.training 0.19.2 makes no MTP layer for models with gated delta nets; the package does."""
    from megatron.training.models import gpt

    def spec(config: Any, decoder: Any, vp_stage: int | None = None) -> Any:
        return mtp_block_spec(config.transformer, vp_stage=vp_stage) if config.transformer.mtp_num_layers else None

    return mock.patch.object(gpt, "mtp_block_spec", spec)


# The loss


class ForwardStep:
    """Megatron's forward step, with a check of the fp32 layers after the first pass of each model chunk."""

    def __init__(self, fp32: Fp32Config) -> None:
        self.fp32 = fp32
        self.seen: set[int] = set()

    def __call__(self, data: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
        """The loss of every token of the next micro-batch, [b, s], and the function that sums it up."""
        device = next(model.parameters()).device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(data).items()}
        losses = model(
            batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=batch["loss_mask"]
        )
        if id(model) not in self.seen:
            self.seen.add(id(model))
            check_fp32(model, self.fp32, after_forward=True)
        return losses, functools.partial(loss, batch["loss_mask"])


def loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The sum over the tokens of this micro-batch, their number, and what is logged."""
    total = (losses.float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


# The data


def datasets(args: argparse.Namespace, samples: list[int], vp_stage: int | None = None) -> Any:
    """Train, validation and test sets; every rank builds them, so that nothing has to be broadcast."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=False,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(kind, samples, lambda: True, config).build()


def compiled_helpers() -> contextlib.AbstractContextManager[Any]:
    """`pretrain` runs make for the dataset helpers. The wheel brings them compiled, without the Makefile."""
    from megatron.core.datasets import utils

    if (Path(utils.__file__).parent / "Makefile").exists():
        return contextlib.nullcontext()
    importlib.import_module("megatron.core.datasets.helpers_cpp")
    return mock.patch.object(utils, "compile_helpers")


if __name__ == "__main__":
    main()
