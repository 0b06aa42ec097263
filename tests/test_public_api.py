from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import importlib.resources
import inspect
import subprocess
import sys
from typing import Any

import pytest
import yaml

import megatron_fp32

# What someone who trains, converts or samples looks for; a name that is added here belongs into docs/api.md, too.
NAMES = [
    "CheckpointError",
    "Divergence",
    "Fp32Config",
    "Fp32GatedDeltaNet",
    "Fp32OutputLayer",
    "Fp8Scheme",
    "HuggingFaceDirectory",
    "LogitsTransform",
    "Logprobs",
    "LogprobsRequest",
    "SGLangOptions",
    "SGLangSink",
    "SelectedLogprobs",
    "SelectedLogprobsRequest",
    "TopLogprobsRequest",
    "TransferError",
    "TruncatedLogprobs",
    "TruncatedLogprobsRequest",
    "VllmOptions",
    "VllmSink",
    "VocabParallel",
    "WeightStreamer",
    "WeightedLoss",
    "WeightedLossRequest",
    "__version__",
    "add_fp32_arguments",
    "apply_fp32",
    "check_fp32",
    "export_checkpoint",
    "fp32_config_from_args",
    "fp32_logits",
    "import_checkpoint",
    "inspect_checkpoint",
    "install_optimizer_repairs",
    "keep_in_fp32",
    "linear_cross_entropy",
    "linear_distillation",
    "linear_logprobs",
    "linear_selected_logprobs",
    "linear_top_k_distillation",
    "linear_top_logprobs",
    "linear_truncated_logprobs",
    "linear_truncation_thresholds",
    "logprobs_from_logits",
    "logprobs_processor",
    "model_provider",
    "named_scheme",
    "pre_wrap_hook",
    "quantize_checkpoint",
    "returning",
    "to_fp32_output_layer",
    "verify_checkpoints",
    "weighted_cross_entropy",
]


def test_the_public_names_are_these() -> None:
    assert sorted(megatron_fp32.__all__) == NAMES


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("__")])
def test_every_name_is_there_and_documented(name: str) -> None:
    thing = getattr(megatron_fp32, name)
    assert inspect.getmodule(thing).__name__.startswith("megatron_fp32.")
    assert inspect.getdoc(thing)


def test_completion_shows_the_public_names_alone() -> None:
    program = "import megatron_fp32; print(*[name for name in dir(megatron_fp32) if not name.startswith('_')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [name for name in NAMES if not name.startswith("_")]


def test_static_types_know_the_same_names() -> None:
    tree = ast.parse(inspect.getsource(megatron_fp32))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: node.module for node in block.body for alias in node.names}
    assert typed == {name: f"megatron_fp32.{module}" for name, module in megatron_fp32._MODULES.items()}


def test_the_version_is_that_of_the_distribution() -> None:
    assert megatron_fp32.__version__ == importlib.metadata.version("megatron_fp32")


def test_a_star_import_gives_exactly_these() -> None:
    space: dict[str, object] = {}
    exec("from megatron_fp32 import *", space)
    assert sorted(set(space) - {"__builtins__"}) == NAMES


@pytest.mark.parametrize("name", ["fp32_logit", "_missing", "__path_of_no_module__"])
def test_other_names_are_attribute_errors(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'megatron_fp32' has no attribute '{name}'"):
        getattr(megatron_fp32, name)
    assert not hasattr(megatron_fp32, name)


def test_the_package_says_that_it_is_typed() -> None:
    assert importlib.resources.files(megatron_fp32).joinpath("py.typed").is_file()


class TestConfig:
    def test_defaults(self) -> None:
        config = megatron_fp32.Fp32Config()
        assert (config.logits, config.grad_precision) == (True, "bf16")
        assert config.gated_delta_net == ("A_log", "out_norm.weight")

    def test_it_is_a_value(self) -> None:
        config = megatron_fp32.Fp32Config()
        assert config == megatron_fp32.Fp32Config()
        assert len({config, megatron_fp32.Fp32Config()}) == 1
        with pytest.raises(AttributeError):
            config.logits = False  # type: ignore[misc]
        with pytest.raises(TypeError):
            megatron_fp32.Fp32Config(True)  # type: ignore[misc]

    @pytest.mark.parametrize("precision", ["fp32", "", None])
    def test_an_unknown_grad_precision(self, precision: str) -> None:
        with pytest.raises(ValueError, match=r"grad_precision must be one of .*bf16.*, got"):
            megatron_fp32.Fp32Config(grad_precision=precision)  # type: ignore[arg-type]

    @pytest.mark.parametrize("names", ["A_log", ("",), ("A_log", 3), (None,)])
    def test_names_that_are_no_tuple_of_names(self, names: tuple[str, ...]) -> None:
        with pytest.raises(ValueError, match="gated_delta_net must be a tuple of non-empty parameter names, got"):
            megatron_fp32.Fp32Config(gated_delta_net=names)

    def test_a_list_of_names_is_taken_for_the_tuple(self) -> None:
        assert megatron_fp32.Fp32Config(gated_delta_net=["A_log"]) == megatron_fp32.Fp32Config(  # type: ignore[arg-type]
            gated_delta_net=("A_log",)
        )

    def test_no_names_keep_nothing(self) -> None:
        assert megatron_fp32.Fp32Config(gated_delta_net=()).gated_delta_net == ()


class TestConfigFromADict:
    """As frameworks give it: parsed YAML, or a node of OmegaConf."""

    def test_every_field(self) -> None:
        section = {
            "logits": True,
            "grad_precision": "bf16x2",
            "invariant": True,
            "fused_loss": "saved",
            "vocab_size": 151936,
            "gated_delta_net": ["A_log"],
        }
        expected = megatron_fp32.Fp32Config(
            grad_precision="bf16x2", invariant=True, fused_loss="saved", vocab_size=151936, gated_delta_net=("A_log",)
        )
        assert megatron_fp32.Fp32Config.from_dict(section) == expected
        assert megatron_fp32.Fp32Config.from_dict(dataclasses.asdict(expected)) == expected
        assert megatron_fp32.Fp32Config.from_dict({}) == megatron_fp32.Fp32Config()

    def test_yaml_reads_off_as_false(self) -> None:
        section = yaml.safe_load("fused_loss: off\ngated_delta_net: []\n")
        assert section["fused_loss"] is False
        assert megatron_fp32.Fp32Config.from_dict(section) == megatron_fp32.Fp32Config(gated_delta_net=())

    @pytest.mark.parametrize(
        ("section", "error", "message"),
        [
            ({"logit": True}, ValueError, "has no field 'logit'; its fields are logits, grad_precision"),
            ({"logits": "true"}, TypeError, "logits must be True or False, got 'true'"),
            ({"logits": 1}, TypeError, "logits must be True or False, got 1"),
            ({"vocab_size": "151936"}, TypeError, "vocab_size must be an int, got '151936'"),
            ({"gated_delta_net": "A_log"}, ValueError, "gated_delta_net must be a tuple of non-empty parameter names"),
            ({"fused_loss": True}, ValueError, "fused_loss must be one of"),
            ("logits: true", TypeError, "expected a mapping with the fields of Fp32Config, got 'logits: true'"),
            (None, TypeError, "expected a mapping"),
        ],
    )
    def test_what_is_refused(self, section: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            megatron_fp32.Fp32Config.from_dict(section)
