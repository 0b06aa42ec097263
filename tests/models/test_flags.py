"""The flags for Megatron's parser."""

from __future__ import annotations

import argparse

import pytest

from megatron_fp32.config import Fp32Config
from megatron_fp32.models.flags import add_fp32_arguments, fp32_config_from_args


class TestArguments:
    def parse(self, *flags: str) -> Fp32Config:
        parser = argparse.ArgumentParser()
        assert add_fp32_arguments(parser) is parser
        return fp32_config_from_args(parser.parse_args(flags))

    def test_without_flags_the_defaults_of_the_configuration(self) -> None:
        assert self.parse() == Fp32Config()

    def test_every_flag(self) -> None:
        assert self.parse("--no-fp32-logits") == Fp32Config(logits=False)
        assert self.parse("--fp32-logits-grad-precision", "bf16x2") == Fp32Config(grad_precision="bf16x2")
        assert self.parse("--fp32-logits-invariant") == Fp32Config(invariant=True)
        assert self.parse("--fp32-gated-delta-net") == Fp32Config(gated_delta_net=())
        assert self.parse("--fp32-gated-delta-net", "A_log") == Fp32Config(gated_delta_net=("A_log",))

    def test_a_parser_without_the_flags(self) -> None:
        with pytest.raises(ValueError, match="call add_fp32_arguments on the parser first"):
            fp32_config_from_args(argparse.Namespace())
