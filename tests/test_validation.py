"""Every choice, flag, size and path is checked where it comes in, before anything is read or written."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fp32 import validation
from megatron_fp32.apply import apply_fp32, pre_wrap_hook
from megatron_fp32.check import check_fp32
from megatron_fp32.checkpoint.compare.findings import VerifyReport
from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.fp8 import Fp8Scheme, named_scheme
from megatron_fp32.checkpoint.inspect import inspect_checkpoint
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.config import Fp32Config
from megatron_fp32.gated_delta_net.layer import Fp32GatedDeltaNet
from megatron_fp32.kept_parameters.keep_in_fp32 import keep_in_fp32
from megatron_fp32.models.flags import add_fp32_arguments, fp32_config_from_args
from megatron_fp32.models.provider import (
    build_model,
    cpu_overrides,
    model_provider,
    padded_vocab_size,
    transformer_config,
)
from megatron_fp32.ops.logits import fp32_logits
from megatron_fp32.ops.logprobs import VocabParallel, linear_cross_entropy, linear_logprobs, weighted_cross_entropy
from megatron_fp32.output_layer.layer import to_fp32_output_layer
from megatron_fp32.output_layer.logprobs_processor import logprobs_processor
from megatron_fp32.output_layer.requests import LogprobsRequest, TopLogprobsRequest
from megatron_fp32.testing.cpu import model_parallel, single_process
from megatron_fp32.testing.qwen3_5 import write_qwen3_5
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.testing.training import Batch, TrainerConfig
from tests.qwen3_5 import tiny_qwen3_5

NO_FLAGS = ("false", "no", 0, 1, None)
NO_SIZES = ("2", 2.0, True, None, 0, -1)
NO_VOCABULARIES = (0, -1, True, 1.0, "151936")
NO_PATHS = (None, 3, b"model", "")


def _import(**options: Any) -> Any:
    return import_checkpoint(**{"hf_dir": "hf", "out": "out", **options})


def _export(**options: Any) -> Any:
    return export_checkpoint(**{"megatron_dir": "megatron", "out": "out", **options})


def _quantize(**options: Any) -> Any:
    return quantize_checkpoint(**{"hf_dir": "hf", "out": "out", "scheme": "blockwise", **options})


def _verify(**options: Any) -> Any:
    return verify_checkpoints(**{"a": "a", "b": "b", **options})


def _inspect(**options: Any) -> Any:
    return inspect_checkpoint(**{"path": "path", **options})


def _scheme(**options: Any) -> Any:
    return Fp8Scheme(**{"format": "blockwise", "scale_format": "fp32", **options})


def _build(**options: Any) -> Any:
    model = tiny_qwen3_5()
    return build_model(model, transformer_config(model, **cpu_overrides()), **options)


def _batch(**options: Any) -> Any:
    return Batch.random(**{"vocab_size": 8, **options})


def _parallel(**options: Any) -> None:
    with model_parallel(**options):
        pass


def _process(**options: Any) -> None:
    with single_process(**options):
        pass


def _model(**options: Any) -> Any:
    return model_provider(**{"hf_dir": "hf", **options})


def _write(**options: Any) -> Any:
    return write_qwen3_5(**{"directory": "hf", **options})


CASES: list[tuple[Callable[..., Any], str, tuple[Any, ...]]] = [
    (Fp32Config, "logits", NO_FLAGS),
    (Fp32Config, "invariant", NO_FLAGS),
    (Fp32Config, "grad_precision", ("fp32", "BF16", "", None, 16, ["bf16"])),
    (Fp32Config, "fused_loss", ("on", True, None, ["off"])),
    (Fp32Config, "vocab_size", tuple(size for size in NO_SIZES if size is not None)),
    (Fp32Config, "gated_delta_net", ("A_log", ("A_log", 3), ("",), None, 3, {"A_log": 1})),
    (_import, "vision", ("kepp", "convert", "Carry", "", None, True, ["carry"])),
    (_import, "mtp", ("refuse", "keep", None, False)),
    (_import, "text_only", NO_FLAGS),
    (_import, "workers", NO_SIZES),
    (_import, "max_part_bytes", (*NO_SIZES, 2e9)),
    (_import, "progress", ("bar", 1)),
    (_import, "hf_dir", NO_PATHS),
    (_import, "out", NO_PATHS),
    (_export, "dtype", ("bf16", "Source", None, torch.bfloat16)),
    (_export, "allow_rounded", NO_FLAGS),
    (_export, "fp8", ("blockwise", True, {})),
    (_export, "workers", NO_SIZES),
    (_export, "max_shard_bytes", (*NO_SIZES, 5e9, "5GB")),
    (_export, "progress", (1,)),
    (_export, "megatron_dir", NO_PATHS),
    (_export, "out", NO_PATHS),
    (_export, "source", (3, "")),
    (_export, "vocab_size", NO_VOCABULARIES),
    (_quantize, "scheme", ("fp8", "", None, 8)),
    (_quantize, "device", ("gpu", "", None, "meta", "cuda:99")),
    (_quantize, "workers", NO_SIZES),
    (_quantize, "max_shard_bytes", NO_SIZES),
    (_quantize, "progress", (1,)),
    (_quantize, "hf_dir", NO_PATHS),
    (_quantize, "out", NO_PATHS),
    (_verify, "a", NO_PATHS),
    (_verify, "b", NO_PATHS),
    (_verify, "source", (3, "")),
    (_verify, "text_only", NO_FLAGS),
    (_verify, "vocab_size", NO_VOCABULARIES),
    (_verify, "progress", (1,)),
    (_inspect, "path", NO_PATHS),
    (_inspect, "source", (3, "")),
    (_scheme, "format", ("block", None)),
    (_scheme, "scale_format", ("float32", "bfloat16", None)),
    (_scheme, "block", (128, [128, 128], (128.0, 128), (True, 1), (128,), (0, 128))),
    (_scheme, "skip", ("lm_head", ["lm_head"], (3,))),
    (_scheme, "modules", ("model", ["model"])),
    (_build, "fp32", ("bf16", {}, True)),
    (_build, "pre_process", NO_FLAGS),
    (_build, "post_process", NO_FLAGS),
    (_build, "parallel_output", NO_FLAGS),
    (_build, "vocab_divisible_by", NO_SIZES),
    (_build, "max_sequence_length", NO_SIZES),
    (_model, "hf_dir", NO_PATHS),
    (_model, "fp32", ("bf16", {}, False)),
    (_model, "bf16", NO_FLAGS),
    (_model, "sequence_parallel", ("false",)),
    (_model, "hidden_sise", (3,)),
    (logprobs_processor, "mean_logit", NO_FLAGS),
    (logprobs_processor, "top_k", ("2", 2.0, True, None, -1)),
    (logprobs_processor, "backward", ("save", None)),
    (logprobs_processor, "chunk_size", (0, -1, "8", 8.0, True)),
    (TopLogprobsRequest, "k", ("2", 2.0, True, None, 0)),
    (LogprobsRequest, "top_k", ("2", 2.0, True, None, -1)),
    (TrainerConfig, "distributed_optimizer", NO_FLAGS),
    (TrainerConfig, "grad_reduce_in_fp32", NO_FLAGS),
    (TrainerConfig, "sharding", ("fully", None)),
    (TrainerConfig, "lr", ("1e-3", -1.0, float("nan"), True, None)),
    (_batch, "batch", NO_SIZES),
    (_batch, "length", NO_SIZES),
    (_batch, "vocab_size", NO_SIZES),
    (_parallel, "tensor", NO_SIZES),
    (_parallel, "pipeline", NO_SIZES),
    (_parallel, "context", NO_SIZES),
    (_parallel, "expert", NO_SIZES),
    (_parallel, "virtual", ("2", 0, True)),
    (_parallel, "expert_tensor", ("2", 0, True)),
    (_process, "backend", ("mpi", None)),
    (_write, "directory", NO_PATHS),
    (_write, "released_names", NO_FLAGS),
    (_write, "seed", ("0", -1, None)),
    (_write, "logits_std", (0, -1.0, "4", float("nan"))),
]


@pytest.mark.parametrize(
    ("call", "name", "value"),
    [pytest.param(call, name, v, id=f"{call.__name__}-{name}-{v!r}") for call, name, values in CASES for v in values],
)
def test_a_value_that_is_not_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., Any], name: str, value: Any
) -> None:
    """The error names the argument and the value. None of the directories is there, so nothing was looked at before."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError)) as caught:
        call(**{name: value})
    message = str(caught.value)
    assert "unexpected keyword" not in message
    words = {"format": "scheme", "modules": "modules"}
    assert words.get(name, name) in message
    assert name in ("hidden_sise", "block") or repr(value) in message or str(value) in message or value == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", [True, False])
def test_what_is_allowed(flag: bool) -> None:
    Fp32Config(logits=flag, invariant=flag, vocab_size=1, gated_delta_net=["A_log"])  # type: ignore[arg-type]
    assert named_scheme("channelwise", skip=("lm_head",)).skip == ("lm_head",)
    TrainerConfig(distributed_optimizer=flag, grad_reduce_in_fp32=flag, weight_decay=0, clip_grad=0.0)


@pytest.mark.parametrize("config", ["bf16", {"logits": True}, True, Fp32Config])
def test_a_configuration_that_is_none(config: Any) -> None:
    layer = torch.nn.Linear(2, 2)
    for call in (
        lambda: apply_fp32(layer, config, weights="loaded"),
        lambda: pre_wrap_hook(config, weights="loaded"),
        lambda: check_fp32(layer, config),
        lambda: to_fp32_output_layer(layer, config),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match="config must be an Fp32Config or None, got"):
            call()


def test_flags_of_the_checks() -> None:
    with pytest.raises(TypeError, match="after_forward must be True or False, got 'no'"):
        check_fp32(torch.nn.Linear(2, 2), after_forward="no")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="values_only must be True or False, got 'no'"):
        VerifyReport.agrees(None, values_only="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [("A_log",), ["A_log"], None, 3])
def test_a_parameters_name_that_is_no_text(name: Any) -> None:
    with pytest.raises(TypeError, match="keep_in_fp32 takes names"):
        keep_in_fp32(torch.nn.Linear(2, 2), name)


def test_one_name_instead_of_several() -> None:
    with pytest.raises(TypeError, match="fp32_parameters must be a tuple of names, got 'A_log'"):
        Fp32GatedDeltaNet(fp32_parameters="A_log")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", NO_SIZES)
def test_sizes_of_the_vocabulary_and_of_pools(size: Any) -> None:
    for call, name in ((padded_vocab_size, "vocab_size"), (RankPool, "world_size")):
        with pytest.raises((TypeError, ValueError), match=name):
            call(*([size] if call is RankPool else [size, 1]))


@pytest.mark.parametrize(("name", "value"), [("backend", "mpi"), ("timeout", 0), ("timeout", "1"), ("setup", 3)])
def test_options_of_a_pool(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        RankPool(1, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp32_logits", "false"),
        ("fp32_logits_invariant", "no"),
        ("fp32_logits_grad_precision", "fp32"),
        ("fp32_fused_loss", "yes"),
        ("fp32_vocab_size", "8"),
        ("fp32_gated_delta_net", "A_log"),
        ("fp32_gated_delta_net", None),
    ],
)
def test_arguments_that_did_not_come_from_the_parser(name: str, value: Any) -> None:
    """A YAML file of arguments gives whatever it says."""
    args = add_fp32_arguments(argparse.ArgumentParser()).parse_args([])
    setattr(args, name, value)
    with pytest.raises((TypeError, ValueError), match=name.removeprefix("fp32_").removeprefix("logits_")):
        fp32_config_from_args(args)


@pytest.mark.parametrize("value", NO_FLAGS)
@pytest.mark.parametrize("name", ["sequence_parallel", "reduce_hidden_grad", "invariant", "mean_logit"])
def test_flags_of_operators(name: str, value: Any) -> None:
    hidden, weight, labels = torch.ones(2, 8), torch.ones(5, 8), torch.zeros(2, dtype=torch.int64)
    operators: list[Callable[..., Any]] = []
    if name in ("invariant", "mean_logit"):
        operators.append(lambda **flags: linear_logprobs(hidden, weight, labels, **flags))
    else:
        operators.append(VocabParallel)
    if name == "invariant":
        operators += [
            lambda **flags: linear_cross_entropy(hidden, weight, labels, **flags),
            lambda **flags: weighted_cross_entropy(hidden, weight, labels, torch.ones(2), **flags),
        ]
    if name != "mean_logit":
        operators.append(lambda **flags: fp32_logits(hidden, weight, **flags))
    for operator in operators:
        with pytest.raises(TypeError, match=f"{name} must be True or False, got {value!r}"):
            operator(**{name: value})


def test_text_only_and_carry(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"text_only=True drops.*vision='carry' and mtp='convert' were"):
        import_checkpoint("hf", tmp_path / "out", text_only=True, vision="carry")


@pytest.mark.parametrize(
    "function", [import_checkpoint, export_checkpoint, quantize_checkpoint, verify_checkpoints, inspect_checkpoint]
)
def test_every_argument_of_a_conversion_is_tried_above(function: Callable[..., Any]) -> None:
    call = next(c for c, _, _ in CASES if function.__name__ in inspect.getsource(c))
    tried = {name for c, name, _ in CASES if c is call}
    assert tried == set(inspect.signature(function).parameters)


def test_a_number_may_be_zero_unless_it_must_be_positive() -> None:
    validation.check_number("x", 0)
    with pytest.raises(ValueError, match="x must be positive, got 0"):
        validation.check_number("x", 0, positive=True)
    with pytest.raises(ValueError, match="x must be at least 0, got nan"):
        validation.check_number("x", float("nan"))
