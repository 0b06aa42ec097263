"""A decoder's shapes and arithmetic, in terms that all families share, and how to read them from `config.json`.

A family derives its own configuration class from `DecoderConfig`. Constants that all models of the family share are set
in that class. `decoder_fields` reads the other fields from `config.json`.

Sources: transformers' `models/<family>/configuration_*.py`, for the names of fields and for their defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any

from megatron_fp32.weights.hf_config.bounds import MAX_LAYERS, check_bounds
from megatron_fp32.weights.hf_config.rotary import SCALING_FIELDS, Llama3RopeScaling, rope_parameters, rotary_fields
from megatron_fp32.weights.hf_config.sizes import LINEAR_ATTENTION_FIELDS, impossible_sizes
from megatron_fp32.weights.hf_config.text import text_part

LINEAR, FULL = "linear_attention", "full_attention"
"""transformers' names for a layer with a gated delta net and for one with softmax attention over the whole context."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The part of a model's `config.json` that decides shapes and arithmetic."""

    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    """`LINEAR` or `FULL` for each layer."""
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    partial_rotary_factor: float = 1.0
    rope_scaling: Llama3RopeScaling | None = None
    intermediate_size: int = 0
    """Intermediate size of dense MLPs; 0 if the model has none."""

    qk_norm: bool = False
    """q and k of each head are normalized."""
    output_gate: bool = False
    """Attention has an output gate. `q_proj` holds, for each head, the rows of q and then the rows of its gate."""
    zero_centred_norms: bool = False
    """Norms multiply by 1 + w, except the norm inside of a gated delta net, which multiplies by w."""

    linear_num_key_heads: int = 0
    linear_num_value_heads: int = 0
    linear_key_head_dim: int = 0
    linear_value_head_dim: int = 0
    linear_conv_kernel_dim: int = 0

    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    shared_expert_intermediate_size: int = 0
    """0 if there is no shared expert. A shared expert always has a gate."""
    norm_topk_prob: bool = True
    """The probabilities of the chosen experts are scaled to add up to 1."""
    dense_layers: tuple[int, ...] = ()
    """Layers of a mixture-of-experts model that have a dense MLP."""

    def __post_init__(self) -> None:
        """Raises ValueError for impossible sizes, naming every field."""
        problems = impossible_sizes(self)
        if problems:
            raise ValueError(f"no model has these sizes: {'; '.join(problems)}")

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

    @property
    def key_dim(self) -> int:
        """Rows of q, and of k, in a gated-delta-net layer."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def value_dim(self) -> int:
        """Rows of v, and of z, in a gated-delta-net layer."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_attention_pattern(self) -> list[int]:
        """megatron-core's `linear_attention_freq`: 1 for a gated-delta-net layer, 0 for attention."""
        return [int(kind == LINEAR) for kind in self.layer_types]

    @property
    def linear_attention_freq(self) -> int | list[int]:
        """megatron-core's field of this name: n if every n-th layer has attention, otherwise the pattern.

        With an MTP layer, `pretrain` of 0.19.2 cannot count floating-point operations for a pattern (training.py).
        """
        pattern = self.linear_attention_pattern
        # n starts at 2: with 1 (only attention), megatron-core would stack the layers.
        for n in range(2, self.num_layers + 2):
            if pattern == [int((index + 1) % n != 0) for index in range(self.num_layers)]:
                return n
        return pattern

    @property
    def moe_layer_pattern(self) -> list[int]:
        """megatron-core's `moe_layer_freq`: 1 for a mixture of experts, 0 for a dense MLP."""
        return [int(bool(self.num_experts) and index not in self.dense_layers) for index in range(self.num_layers)]

    @property
    def is_router_weight_one(self) -> bool:
        """The router chooses one expert and scales its probability to 1."""
        return bool(self.num_experts) and self.num_experts_per_tok == 1 and self.norm_topk_prob

    @property
    def has_gated_delta_net(self) -> bool:
        """The family has gated-delta-net layers, even if this model has none."""
        return self.linear_num_key_heads > 0

    @property
    def is_homogeneous(self) -> bool:
        """All layers are alike, so that megatron-core stacks them in a checkpoint (transformer_block.py)."""
        return not self.has_gated_delta_net and not self.dense_layers

    def megatron_arguments(self) -> list[str]:
        """The model as flags of Megatron's argument parser, for `pretrain_gpt.py` (`megatron.training` of 0.19.2).

        They give the `TransformerConfig` of `models.provider.transformer_config`. The caller adds lengths, parallelism,
        precision and all other settings of the run.

        Raises:
            ValueError: for rotary scaling or a rotary base that has no flag, and for routers that choose one expert
                with probability 1.
        """
        if self.is_router_weight_one:
            raise ValueError(
                "Megatron's parser refuses num_experts_per_tok=1 with norm_topk_prob=True, because every probability "
                "is 1; build the model with model_provider"
            )
        flags: dict[str, Any] = {
            "num-layers": self.num_layers,
            "hidden-size": self.hidden_size,
            "ffn-hidden-size": self.intermediate_size or self.moe_intermediate_size,
            "num-attention-heads": self.num_attention_heads,
            "num-query-groups": self.num_key_value_heads,
            "kv-channels": self.head_dim,
            "normalization": "RMSNorm",
            "norm-epsilon": self.rms_norm_eps,
            "hidden-dropout": 0.0,
            "attention-dropout": 0.0,
            "position-embedding-type": "rope",
            "rotary-base": self._rotary_base(),
            "rotary-percent": self.partial_rotary_factor,
            "vocab-size": self.vocab_size,
        }
        switches = {
            "group-query-attention": True,
            "apply-layernorm-1p": self.zero_centred_norms,
            "swiglu": True,
            "disable-bias-linear": True,
            "qk-layernorm": self.qk_norm,
            "attention-output-gate": self.output_gate,
            "untie-embeddings-and-output-weights": not self.tie_word_embeddings,
            "use-rope-scaling": self.rope_scaling is not None,
        }
        if self.rope_scaling is not None:
            flags["rope-scaling-factor"] = self._rope_scaling_factor()
        if self.has_gated_delta_net:
            flags["experimental-attention-variant"] = "gated_delta_net"
            flags["linear-attention-freq"] = _as_flag(self.linear_attention_freq)
            flags |= {name.replace("_", "-"): getattr(self, name) for name in LINEAR_ATTENTION_FIELDS}
        if self.num_experts:
            flags["num-experts"] = self.num_experts
            flags["moe-ffn-hidden-size"] = self.moe_intermediate_size
            flags["moe-router-topk"] = self.num_experts_per_tok
            switches["moe-router-pre-softmax"] = not self.norm_topk_prob
        if self.dense_layers:
            flags["moe-layer-freq"] = _as_flag(self.moe_layer_pattern)
        if self.shared_expert_intermediate_size:
            flags["moe-shared-expert-intermediate-size"] = self.shared_expert_intermediate_size
            switches["moe-shared-expert-gate"] = True
        pairs = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        return [*pairs, *(f"--{name}" for name, on in switches.items() if on)]

    def _rotary_base(self) -> int:
        if not float(self.rope_theta).is_integer():
            raise ValueError(
                f"Megatron's --rotary-base takes whole numbers, but this model has rope_theta={self.rope_theta!r}; "
                "build the model with model_provider"
            )
        return int(self.rope_theta)

    def _rope_scaling_factor(self) -> float:
        """The factor. The other numbers must equal megatron-core's constants (rotary_pos_embedding.py)."""
        scaling = self.rope_scaling
        assert scaling is not None
        built_in = Llama3RopeScaling(
            factor=scaling.factor, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192
        )
        if scaling != built_in:
            raise ValueError(f"Megatron has no flags for the rotary scaling {scaling}; its constants are {built_in}")
        return scaling.factor


def _as_flag(freq: int | Sequence[int]) -> str:
    return str(freq).replace(" ", "")


def text_config(config: Any, family: str, model_types: Collection[str]) -> dict[str, Any]:
    """The checked text model's part of a parsed `config.json`: all of it, or `text_config` of a vision-language model.

    Raises:
        ValueError: for another `model_type`, and for fields with values that no model has.
    """
    text = text_part(config)
    if text is None:
        found = config["text_config"] if isinstance(config, dict) else config
        raise ValueError(f"config.json must hold an object, got {type(found).__name__}")
    if text.get("model_type") not in model_types:
        wanted = " or ".join(map(repr, model_types))
        raise ValueError(f"{family}: expected model_type {wanted}, got {text.get('model_type')!r}")
    rope = rope_parameters(text)
    wrong = [
        f"{name} must be {kind}, got {str(value[name])[:100]!r}"
        for value, kinds in ((text, _KINDS), (rope, _ROPE_KINDS))
        for name, (kind, is_right) in kinds.items()
        if value.get(name) is not None and not is_right(value[name])
    ]
    if wrong:
        raise ValueError(f"config.json: {'; '.join(wrong)}")
    check_bounds(text)
    return text


_Kind = tuple[str, Callable[[Any], bool]]


def _integer(least: int, most: int = 2**31 - 1) -> _Kind:
    # bool is an int.
    return f"an integer from {least} to {most}", lambda value: type(value) is int and least <= value <= most


_NUMBER: _Kind = "a finite number", lambda value: type(value) in (int, float) and abs(value) < 1e300
_POSITIVE: _Kind = "a finite number above 0", lambda value: type(value) in (int, float) and 0 < value < 1e300
_TRUTH: _Kind = "true or false", lambda value: isinstance(value, bool)

_KINDS: dict[str, _Kind] = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads"), _integer(1)),
    **dict.fromkeys((*LINEAR_ATTENTION_FIELDS, "decoder_sparse_step", "head_dim"), _integer(1)),
    **dict.fromkeys(("full_attention_interval", "num_experts_per_tok"), _integer(0)),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), _integer(0)),
    "num_hidden_layers": _integer(1, MAX_LAYERS),
    **dict.fromkeys(("num_experts", "num_local_experts"), _integer(0, 65536)),
    "rms_norm_eps": _NUMBER,
    **dict.fromkeys(("norm_topk_prob", "tie_word_embeddings"), _TRUTH),
    "layer_types": ("a list of text", lambda value: _is_list(value, str)),
    "mlp_only_layers": ("a list of integers", lambda value: _is_list(value, int)),
}
_ROPE_KINDS = dict.fromkeys(("rope_theta", "partial_rotary_factor", *SCALING_FIELDS), _POSITIVE)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def require(text: dict[str, Any], family: str, *, rope_types: Sequence[str] = ("default",), **expected: Any) -> None:
    """Refuse arithmetic that is not implemented. An absent field counts as the expected value.

    Raises:
        ValueError: naming every field with another value.
    """
    rope_type = rope_parameters(text)["rope_type"]
    expected = {"per_layer_config": None, **expected}
    wrong = [f"{k}={text[k]!r} (expected {want!r})" for k, want in expected.items() if text.get(k, want) != want]
    if rope_type not in rope_types:
        wrong.append(f"rope_type={rope_type!r} (expected {' or '.join(map(repr, rope_types))})")
    if wrong:
        raise ValueError(f"this {family} config is not supported: " + ", ".join(wrong))


def require_parts(text: dict[str, Any], family: str, *names: str) -> None:
    """Refuse the size 0 for a part that every model of a family has.

    Raises:
        ValueError: naming every field that is 0.
    """
    wrong = [name for name in names if text.get(name) == 0]
    if wrong:
        raise ValueError(f"this {family} config is not supported: {', '.join(wrong)} must be at least 1, got 0")


def decoder_fields(
    config: dict[str, Any],
    text: dict[str, Any],
    names: Sequence[str] = (),
    *,
    rope_theta: float = 1e4,
    partial_rotary_factor: float | None = None,
) -> dict[str, Any]:
    """Fields of `DecoderConfig` from a `config.json`.

    Args:
        config: the whole file.
        text: the part that `text_config` returns.
        names: further fields, which have one name in `config.json` and in `DecoderConfig`.
        rope_theta: transformers' default for the model type.
        partial_rotary_factor: transformers' default for the model type; None if it always rotates whole heads.

    Raises:
        ValueError: naming every field that is absent or has an impossible value.
    """
    common = ("vocab_size", "hidden_size", "num_attention_heads", "rms_norm_eps")
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        found = str(config["tie_word_embeddings"])[:100]
        raise ValueError(f"config.json: tie_word_embeddings must be true or false, got {found!r}")
    missing = sorted(name for name in {*common, *names, "num_hidden_layers"} if text.get(name) is None)
    is_hybrid = "linear_num_key_heads" in names
    if is_hybrid and not (text.get("layer_types") or text.get("full_attention_interval")):
        missing.append("layer_types")
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    heads = text["num_attention_heads"]
    return {
        **{name: text[name] for name in (*common, *names)},
        "num_key_value_heads": text.get("num_key_value_heads") or heads,
        "head_dim": text.get("head_dim") or text["hidden_size"] // heads,
        "layer_types": _layer_types(text, is_hybrid=is_hybrid),
        **rotary_fields(text, theta=rope_theta, partial_rotary_factor=partial_rotary_factor),
        # transformers reads this field from the outer config and ignores the text model's.
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
    }


def dense_layers(text: dict[str, Any]) -> tuple[int, ...]:
    """Layers without experts, from `mlp_only_layers` and `decoder_sparse_step`."""
    step, dense = text.get("decoder_sparse_step") or 1, set(text.get("mlp_only_layers") or ())
    return tuple(i for i in range(text["num_hidden_layers"]) if i in dense or (i + 1) % step != 0)


def _layer_types(text: dict[str, Any], *, is_hybrid: bool) -> tuple[str, ...]:
    kinds = (LINEAR, FULL) if is_hybrid else (FULL,)
    count, interval = text["num_hidden_layers"], text.get("full_attention_interval")
    layer_types = text.get("layer_types")
    if layer_types is None:
        layer_types = [LINEAR if interval and is_hybrid and (i + 1) % interval else FULL for i in range(count)]
    if len(layer_types) != count or not set(layer_types) <= set(kinds):
        expected = " or ".join(map(repr, kinds))
        raise ValueError(f"layer_types must name {count} layers, each {expected}, got {list(layer_types)}")
    return tuple(layer_types)
