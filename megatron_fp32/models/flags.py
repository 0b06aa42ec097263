"""Command-line flags for a Megatron argument parser, and the `Fp32Config` that they give."""

from __future__ import annotations

import argparse
from typing import TypeVar, get_args

from megatron_fp32.config import DEFAULT_KEPT_PARAMETERS, Fp32Config, FusedLoss
from megatron_fp32.ops.products.grad_precision import GradPrecision

Parser = TypeVar("Parser", bound=argparse.ArgumentParser)


def add_fp32_arguments(parser: Parser) -> Parser:
    """Add the flags, and return the parser. Pass this function to Megatron's `pretrain` as `extra_args_provider`."""
    group = parser.add_argument_group("megatron_fp32")
    group.add_argument(
        "--fp32-logits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute the output layer's logits in fp32",
    )
    group.add_argument(
        "--fp32-logits-grad-precision",
        choices=get_args(GradPrecision),
        default=Fp32Config().grad_precision,
        help="bits of the logits' gradient that the backward products use: 8 (bf16), 16 (bf16x2) or 24 (bf16x3)",
    )
    group.add_argument(
        "--fp32-logits-invariant",
        action="store_true",
        help="compute logits whose bits do not depend on the batch, its padding or the tensor-parallel size",
    )
    group.add_argument(
        "--fp32-fused-loss",
        choices=get_args(FusedLoss),
        default=Fp32Config().fused_loss,
        help="compute the loss from the hidden states; the backward pass computes the logits again (recompute) or "
        "reads the saved logits of this rank (saved)",
    )
    group.add_argument(
        "--fp32-vocab-size",
        type=int,
        metavar="TOKENS",
        help="size of the vocabulary without padding rows; the fused loss gives padding rows no probability",
    )
    group.add_argument(
        "--fp32-gated-delta-net",
        nargs="*",
        metavar="PARAMETER",
        default=list(DEFAULT_KEPT_PARAMETERS),
        help="parameters of every gated-delta-net layer that stay fp32; the flag without a name keeps none",
    )
    return parser


def fp32_config_from_args(args: argparse.Namespace) -> Fp32Config:
    """The `Fp32Config` from parsed flags.

    Raises:
        ValueError: when the flags were not added to the parser, or a flag has a value that is not allowed.
        TypeError: for a value of another type, such as from a YAML file of arguments.
    """
    if not hasattr(args, "fp32_logits_grad_precision"):
        raise ValueError("args has no --fp32-... flags: call add_fp32_arguments on the parser first")
    return Fp32Config(
        logits=args.fp32_logits,
        grad_precision=args.fp32_logits_grad_precision,
        invariant=args.fp32_logits_invariant,
        fused_loss=args.fp32_fused_loss,
        vocab_size=args.fp32_vocab_size,
        gated_delta_net=args.fp32_gated_delta_net,
    )
