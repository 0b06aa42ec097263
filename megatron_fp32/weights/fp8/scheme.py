"""What a float8 checkpoint looks like, and which of a model's weights are float8 in it."""

from __future__ import annotations

import dataclasses
import re
from fnmatch import fnmatchcase
from typing import get_args

import torch

from megatron_fp32.ops.fp8.scales import SCALE_FORMATS, ScaleFormat, scale_dtype
from megatron_fp32.validation import check_choice
from megatron_fp32.weights.choices import Fp8Format
from megatron_fp32.weights.tensors import TensorInfo

FP8_FORMATS: tuple[Fp8Format, ...] = get_args(Fp8Format)

QUANTIZED = re.compile(
    r"(?:(?:model|language_model|mtp)\.)*layers\.\d+\."
    r"(?:self_attn\.(?:[qkvo]_proj|q_[ab]_proj|kv_a_proj_with_mqa|kv_b_proj)"
    r"|linear_attn\.(?:in_proj_(?:qkv|z|qkvz)|out_proj)"
    r"|mlp\.(?:experts\.\d+\.|shared_experts?\.)?(?:gate|up|down)_proj)"
)
"""The only modules that a scheme may quantize: the large projections in the layers of a text model, which the producers
quantize and the engines build for float8 (DeepSeek's attention included, whose format "blockwise" is).

Everything else keeps its dtype: heads under any name (`lm_head`, `score`, `v_head`, `qa_outputs`; vLLM builds them
without a quantization, vLLM#35849), embeddings, norms, `conv1d`, `in_proj_a`, `in_proj_b`, `in_proj_ba`, routers, gates
of shared experts, vision and audio towers, `mtp.fc`, `eh_proj`. A name that is not known here is not quantized: a layer
in 16 bits costs memory, one that an engine builds without scales cannot be loaded."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8Scheme:
    """A format of float8_e4m3fn weights, with dynamic activations.

    | format | producer | scale of `X.weight` [N, K] | rule of `skip` |
    |---|---|---|---|
    | "blockwise" | DeepSeek, Qwen: `quant_method: fp8` | `X.weight_scale_inv` [ceil(N / 128), ceil(K / 128)] | transformers' |
    | "channelwise" | llm-compressor: `compressed-tensors` | `X.weight_scale` [N, 1] | compressed-tensors' |
    | "modelopt" | ModelOpt: `FP8_PER_CHANNEL_PER_TOKEN` | `X.weight_scale` [N] | vLLM's |

    Raises:
        ValueError: for fields that no checkpoint has.
        TypeError: for a list of modules that is no tuple, or a block that is no pair of ints.
    """  # noqa: E501

    format: Fp8Format
    scale_format: ScaleFormat
    block: tuple[int, int] = (128, 128)
    """Rows and columns of a block; of "blockwise" only."""
    skip: tuple[str, ...] = ()
    """Further modules that are not quantized, as the producer's config lists them."""
    modules: frozenset[str] | None = None
    """Exactly these are quantized, as the headers of an existing checkpoint say; `skip` is then not consulted."""

    def __post_init__(self) -> None:
        if self.format not in FP8_FORMATS:
            raise ValueError(f"unknown float8 scheme {self.format!r}; known are {', '.join(FP8_FORMATS)}")
        check_choice("scale_format", self.scale_format, SCALE_FORMATS)
        if not isinstance(self.block, tuple) or not all(type(size) is int for size in self.block):
            raise TypeError(f"block must be a tuple of two ints, got {self.block!r}")
        if not isinstance(self.skip, tuple) or not all(isinstance(entry, str) for entry in self.skip):
            raise TypeError(f"skip must be a tuple of names of modules, got {self.skip!r}")
        if self.modules is not None and not isinstance(self.modules, frozenset):
            raise TypeError(f"modules must be a frozenset of names or None, got {self.modules!r}")
        if self.scale_format == "ue8m0" and self.format != "blockwise":
            raise ValueError(f"powers of two are scales of blockwise checkpoints only, not of {self.format} ones")
        if len(self.block) != 2 or min(self.block) < 1:
            raise ValueError(f"a block must have one or more rows and columns, got {self.block}")
        for entry in self.skip:
            try:
                self._matches(entry, "")
            except re.error as error:
                raise ValueError(
                    f"{entry!r} in the list of modules to skip is not a regular expression: {error}"
                ) from error

    @property
    def scale_suffix(self) -> str:
        """What follows the module's name in that of its scale."""
        return ".weight_scale_inv" if self.format == "blockwise" else ".weight_scale"

    @property
    def zero_scale(self) -> float:
        """The scale of weights that are all zero.

        1 in transformers (`Fp8Quantize`) and ModelOpt, the smallest step of the scale's dtype in compressed-tensors
        (`calculate_qparams`).
        """
        return float(torch.finfo(scale_dtype(self.scale_format)).eps) if self.format == "channelwise" else 1.0

    def skips(self, module: str) -> bool:
        """Whether the list names the module, by the rules of whoever wrote it."""
        return any(self._matches(entry, module) for entry in self.skip)

    def _matches(self, entry: str, module: str) -> bool:
        if self.format == "blockwise":
            # transformers/quantizers/quantizers_utils.py, should_convert_module. vLLM wants the whole name.
            return bool(re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", module)) or module.endswith(entry)
        if self.format == "channelwise":
            # compressed_tensors/utils/match.py, match_name.
            return bool(re.match(entry[3:], module)) if entry.startswith("re:") else entry == module
        # vllm/model_executor/layers/quantization/modelopt.py, is_layer_excluded.
        return entry in module or fnmatchcase(module, entry)


def named_scheme(name: str, *, skip: tuple[str, ...] = ()) -> Fp8Scheme:
    """The scheme of that format with the scales that its producer writes.

    Those are float32 in DeepSeek's and ModelOpt's files, and bfloat16, the dtype of the model, in llm-compressor's
    (compressed_tensors/quantization/lifecycle/initialize.py). Qwen's blockwise scales are bfloat16, too: that takes
    `Fp8Scheme(format="blockwise", scale_format="bf16")`, and every loader reads either.

    Args:
        name: "blockwise", "channelwise" or "modelopt".
        skip: see `Fp8Scheme`.

    Raises:
        ValueError: for another name.
    """
    if name not in FP8_FORMATS:
        raise ValueError(f"unknown float8 scheme {name!r}; known are {', '.join(FP8_FORMATS)}")
    return Fp8Scheme(format=name, scale_format="bf16" if name == "channelwise" else "fp32", skip=skip)


def is_quantized(name: str, info: TensorInfo, scheme: Fp8Scheme) -> bool:
    """Whether a tensor [N, K] becomes float8. Fused experts are asked for by the names of `expert_parts`."""
    module = name.removesuffix(".weight")
    if module == name or len(info.shape) != 2 or info.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if not QUANTIZED.fullmatch(module):
        return False
    return not scheme.skips(module) if scheme.modules is None else module in scheme.modules
