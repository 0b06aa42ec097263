"""The part of a config that says how the weights are quantized: made from a scheme, and a scheme from it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch

from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.fp8.scheme import Fp8Scheme, named_scheme
from megatron_fp32.weights.naming import PREFIXES
from megatron_fp32.weights.tensors import TensorInfo

MODELOPT_FILE = "hf_quant_config.json"
_MODELOPT_ALGORITHM = "FP8_PER_CHANNEL_PER_TOKEN"
_EXPERTS = re.compile(r"(.*\.experts)\.")


def quantization_config(infos: Mapping[str, TensorInfo], scheme: Fp8Scheme) -> dict[str, Any]:
    """The `quantization_config` for `config.json`; modules that stay as they are are listed by their full names.

    Args:
        infos: all tensors of the float8 checkpoint, as `fp8_infos` gives them.
        scheme: its format.
    """
    kept = unquantized_modules(infos)
    if scheme.format == "blockwise":
        config: dict[str, Any] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(scheme.block),
            "modules_to_not_convert": kept,
        }
        return config | ({"scale_fmt": "ue8m0"} if scheme.scale_format == "ue8m0" else {})
    if scheme.format == "modelopt":
        return {"quant_method": "modelopt", "quant_algo": _MODELOPT_ALGORITHM, "ignore": kept}
    common = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**common, "strategy": "channel", "dynamic": False},
                "input_activations": {**common, "strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
        "format": "float-quantized",
        "ignore": kept,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def described_scheme(scheme: Fp8Scheme) -> dict[str, Any]:
    """All of a scheme, for JSON."""
    return {**dataclasses.asdict(scheme), "modules": None if scheme.modules is None else sorted(scheme.modules)}


def extra_files(infos: Mapping[str, TensorInfo], scheme: Fp8Scheme) -> dict[str, Any]:
    """Content of further JSON files beside `config.json`, by their names; arguments as in `quantization_config`."""
    if scheme.format != "modelopt":
        return {}
    quantization = {
        "quant_algo": _MODELOPT_ALGORITHM,
        "kv_cache_quant_algo": None,
        "exclude_modules": unquantized_modules(infos),
    }
    # Without the producer's name vLLM does not take the file for what it is.
    return {MODELOPT_FILE: {"producer": {"name": "modelopt"}, "quantization": quantization}}


def unquantized_modules(infos: Mapping[str, TensorInfo]) -> list[str]:
    """Modules that a loader must not build for float8, by their full names.

    Beside the modules whose weight has two dimensions or more and is not float8 these are:

    - `lm_head`, always: a tied head has no tensor of its own, but transformers builds it as a linear layer.
    - `X.experts` where no expert of X is float8: transformers builds all experts of a layer as one module.
    - `model.X` for every `model.language_model.X`: `AutoModelForCausalLM` builds the text model of a vision-language
      checkpoint under these names.
    """
    kept = {"lm_head"}
    experts: dict[str, bool] = {}
    for name, info in infos.items():
        quantized = info.dtype == torch.float8_e4m3fn
        if match := _EXPERTS.match(name):
            experts[match[1]] = experts.get(match[1], False) or quantized
        if name.endswith(".weight") and len(info.shape) > 1 and not quantized:
            kept.add(name.removesuffix(".weight"))
    kept.update(module for module, quantized in experts.items() if not quantized)
    inside, alone = PREFIXES
    kept.update([alone + name.removeprefix(inside) for name in kept if name.startswith(inside)])
    return sorted(kept)


def scheme_from_config(config: Mapping[str, Any]) -> Fp8Scheme:
    """The scheme that a `quantization_config`, or the content of `hf_quant_config.json`, describes.

    The dtype of scales is in no config: it is taken to be what `named_scheme` says.

    Raises:
        CheckpointError: for a config that describes none of the known schemes.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"a description of a quantization must be an object, got {_shown(config)}")
    method, producer = config.get("quant_method"), _part(config, "producer")
    if method == "fp8":
        return _blockwise(config)
    if method == "compressed-tensors":
        return _channelwise(config)
    if method == "modelopt" or producer.get("name") == "modelopt":
        quantization = _part(config, "quantization") if "quantization" in config else config
        _expect(quantization, {"quant_algo": (_MODELOPT_ALGORITHM,)})
        return named_scheme("modelopt", skip=_names(quantization, "exclude_modules", "ignore"))
    raise CheckpointError(
        f"unknown quantization method {_shown(method)}; known are 'fp8', 'compressed-tensors', 'modelopt'"
    )


def _blockwise(config: Mapping[str, Any]) -> Fp8Scheme:
    _expect(config, {"activation_scheme": ("dynamic",), "fmt": ("e4m3", None), "scale_fmt": ("float", "ue8m0", None)})
    block: Any = config.get("weight_block_size")
    is_pair = isinstance(block, list | tuple) and len(block) == 2
    if not is_pair or not all(type(size) is int and 0 < size < 2**31 for size in block):
        raise CheckpointError(
            f"weight_block_size must be two numbers above 0, got {_shown(block)}: without, scales are per tensor"
        )
    power_of_two = config.get("scale_fmt") == "ue8m0"
    return Fp8Scheme(
        format="blockwise",
        scale_format="ue8m0" if power_of_two else "fp32",
        block=(block[0], block[1]),
        skip=_expressions(_names(config, "modules_to_not_convert", "ignored_layers")),
    )


def _channelwise(config: Mapping[str, Any]) -> Fp8Scheme:
    _expect(config, {"format": ("float-quantized", "naive-quantized"), "kv_cache_scheme": (None,)})
    groups = _part(config, "config_groups")
    if len(groups) != 1:
        raise CheckpointError(f"expected one group of quantized modules, got {_shown(sorted(groups))}")
    group = _part(groups, *groups)
    common = {"num_bits": (8,), "type": ("float",), "symmetric": (True, None)}
    _expect(group, {"targets": (["Linear"],), "output_activations": (None,)})
    _expect(_part(group, "weights"), {**common, "strategy": ("channel",), "dynamic": (False, None)})
    _expect(_part(group, "input_activations"), {**common, "strategy": ("token",), "dynamic": (True,)})
    return named_scheme("channelwise", skip=_expressions(_names(config, "ignore")))


def _part(config: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """An object in an object; empty where there is none."""
    found = config.get(field)
    if found is not None and not isinstance(found, Mapping):
        raise CheckpointError(f"{field[:100]} must be an object, got {_shown(found)}")
    return found or {}


def _names(config: Mapping[str, Any], *fields: str) -> tuple[str, ...]:
    """The list of names in the first of the fields that has any."""
    for field in fields:
        found = config.get(field)
        if found is not None and not (isinstance(found, list | tuple) and all(isinstance(n, str) for n in found)):
            raise CheckpointError(f"{field} must be a list of names of modules, got {_shown(found)}")
        if found:
            return tuple(found)
    return ()


def _expressions(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Raise for regular expressions that can take exponential time to match: a repetition that is repeated, or many."""
    for entry in entries:
        if len(entry) > 1000 or re.search(r"\)[*+{]", entry) or len(re.findall(r"[*+{]", entry)) > 4:
            raise CheckpointError(f"{_shown(entry)} in a list of modules has too many repetitions to be matched")
    return entries


def _expect(config: Mapping[str, Any], expected: Mapping[str, tuple[Any, ...]]) -> None:
    for field, values in expected.items():
        if config.get(field) not in values:
            known = " or ".join(repr(value) for value in values)
            raise CheckpointError(f"unknown float8 scheme: {field} is {_shown(config.get(field))}, expected {known}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
