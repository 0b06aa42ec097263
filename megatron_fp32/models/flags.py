"""Command-line flags for a Megatron argument parser, and the configuration they stand for."""

from __future__ import annotations

import argparse
from typing import TypeVar, get_args

from megatron_fp32.config import DEFAULT_KEPT_PARAMETERS, Fp32Config, FusedLoss
from megatron_fp32.ops.products.grad_precision import GradPrecision

Parser = TypeVar("Parser", bound=argparse.ArgumentParser)


def add_fp32_arguments(parser: Parser) -> Parser:
    """Add the flags, and return the parser: this is an `extra_args_provider` as Megatron's `pretrain` takes it."""
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
        help="bits of the logits' gradient that the backward products see: 8, 16 or 24",
    )
    group.add_argument(
        "--fp32-logits-invariant",
        action="store_true",
        help="logits whose bits do not depend on the batch, its padding or the tensor-parallel size",
    )
    group.add_argument(
        "--fp32-fused-loss",
        choices=get_args(FusedLoss),
        default=Fp32Config().fused_loss,
        help="compute the loss without storing logits; the backward pass computes them again, or finds them saved",
    )
    group.add_argument(
        "--fp32-vocab-size",
        type=int,
        metavar="TOKENS",
        help="tokens of the vocabulary without padding, to which the fused loss gives all probability",
    )
    group.add_argument(
        "--fp32-gated-delta-net",
        nargs="*",
        metavar="PARAMETER",
        default=list(DEFAULT_KEPT_PARAMETERS),
        help="parameters of every gated-delta-net layer that stay fp32; none after the flag keeps none",
    )
    return parser


def fp32_config_from_args(args: argparse.Namespace) -> Fp32Config:
    """The configuration that the flags ask for.

    Raises:
        ValueError: when the flags were not added to the parser, or one of them has a value that is not allowed.
        TypeError: for a value of another type, which a file of arguments can give.
    """
    if not hasattr(args, "fp32_logits_grad_precision"):
        raise ValueError("the arguments lack --fp32-logits and its like: pass add_fp32_arguments to the parser")
    return Fp32Config(
        logits=args.fp32_logits,
        grad_precision=args.fp32_logits_grad_precision,
        invariant=args.fp32_logits_invariant,
        fused_loss=args.fp32_fused_loss,
        vocab_size=args.fp32_vocab_size,
        gated_delta_net=args.fp32_gated_delta_net,
    )
