"""Qwen3.5 text, dense: its shapes from a Hugging Face config, and which tensor is which.

Layers alternate between gated delta net and gated attention. Two naming styles exist for the same tensors: the released
checkpoints put the text model under `model.language_model.`, transformers' text class under `model.`.

Sources: transformers `models/qwen3_5/modeling_qwen3_5.py`; megatron-core `ssm/gated_delta_net` (rows of `in_proj` and
`conv1d`), `transformer/attention.py` (rows of `linear_qkv`), `transformer/mlp.py` (gate before up).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from megatron_fp32.models.mapping import ConcatRows, GatedQkv, Mapping, Rename, SplitRows, ZeroCentred

PREFIXES = ("model.language_model.", "model.")
"""What the text model's tensors may start with, the longer first."""

SKIPPABLE = {"vision": "model.visual.", "MTP": "mtp."}
"""Parts of a released checkpoint outside of the text model, and the prefix of their tensors."""

_LINEAR, _FULL = "linear_attention", "full_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen35Config:
    """The part of a Qwen3.5 `config.json` that decides shapes and arithmetic."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    linear_num_key_heads: int
    linear_num_value_heads: int
    linear_key_head_dim: int
    linear_value_head_dim: int
    linear_conv_kernel_dim: int
    layer_types: tuple[str, ...]
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    tie_word_embeddings: bool

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
        return [int(kind == _LINEAR) for kind in self.layer_types]

    def megatron_arguments(self) -> list[str]:
        """The model as flags of Megatron's argument parser, for `pretrain_gpt.py` (`megatron.training` of 0.19.2).

        They make the `TransformerConfig` of `models.provider.transformer_config`. Lengths, parallelism, precision and
        everything else about the run are the caller's.
        """
        flags = {
            "num-layers": self.num_layers,
            "hidden-size": self.hidden_size,
            "ffn-hidden-size": self.intermediate_size,
            "num-attention-heads": self.num_attention_heads,
            "num-query-groups": self.num_key_value_heads,
            "kv-channels": self.head_dim,
            "normalization": "RMSNorm",
            "norm-epsilon": self.rms_norm_eps,
            "hidden-dropout": 0.0,
            "attention-dropout": 0.0,
            "position-embedding-type": "rope",
            "rotary-base": int(self.rope_theta),
            "rotary-percent": self.partial_rotary_factor,
            "experimental-attention-variant": "gated_delta_net",
            "linear-attention-freq": str(self.linear_attention_pattern).replace(" ", ""),
            "linear-conv-kernel-dim": self.linear_conv_kernel_dim,
            "linear-key-head-dim": self.linear_key_head_dim,
            "linear-value-head-dim": self.linear_value_head_dim,
            "linear-num-key-heads": self.linear_num_key_heads,
            "linear-num-value-heads": self.linear_num_value_heads,
            "vocab-size": self.vocab_size,
        }
        switches = ["group-query-attention", "apply-layernorm-1p", "swiglu", "disable-bias-linear", "qk-layernorm"]
        switches += ["attention-output-gate"] + (
            [] if self.tie_word_embeddings else ["untie-embeddings-and-output-weights"]
        )
        pairs = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
        return [*pairs, *(f"--{name}" for name in switches)]

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Qwen35Config:
        """From a parsed `config.json`, of the text model or of the vision-language model around it.

        Raises:
            ValueError: for another family, a mixture of experts, or arithmetic that this mapping does not know.
        """
        text = config.get("text_config", config) if isinstance(config, dict) else None
        if not isinstance(text, dict):
            raise ValueError(f"config.json must hold an object, got {type(text or config).__name__}")
        if text.get("model_type") not in ("qwen3_5_text", "qwen3_5"):
            raise ValueError(f"expected model_type 'qwen3_5' or 'qwen3_5_text', got {text.get('model_type')!r}")
        rope = text.get("rope_parameters") or {}
        required = {
            "hidden_act": (text.get("hidden_act", "silu"), "silu"),
            "attention_bias": (text.get("attention_bias", False), False),
            "attn_output_gate": (text.get("attn_output_gate", True), True),
            "num_experts": (text.get("num_experts", 0), 0),
            "rope_type": (rope.get("rope_type", "default"), "default"),
        }
        wrong = [f"{k}={got!r} (expected {want!r})" for k, (got, want) in required.items() if got != want]
        if wrong:
            raise ValueError("this Qwen3.5 config is not supported: " + ", ".join(wrong))
        fields = {f.name for f in dataclasses.fields(cls)}
        missing = sorted({*(fields - _DERIVED), "layer_types", "num_hidden_layers"} - text.keys())
        missing += [] if "rope_theta" in rope else ["rope_parameters.rope_theta"]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}")
        layer_types = tuple(text["layer_types"])
        if len(layer_types) != text["num_hidden_layers"] or not set(layer_types) <= {_LINEAR, _FULL}:
            raise ValueError(
                f"layer_types must name {text['num_hidden_layers']} layers, each {_LINEAR!r} or {_FULL!r}, "
                f"got {list(layer_types)}"
            )
        return cls(
            **{name: text[name] for name in fields - _DERIVED},
            layer_types=layer_types,
            rope_theta=float(rope["rope_theta"]),
            partial_rotary_factor=float(rope.get("partial_rotary_factor", 0.25)),
            # transformers ties by the outer config.
            tie_word_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        )


_DERIVED = {"layer_types", "rope_theta", "partial_rotary_factor", "tie_word_embeddings"}


def find_prefix(names: Collection[str]) -> str:
    """Which of `PREFIXES` a checkpoint's tensor names use.

    Raises:
        ValueError: when neither fits.
    """
    for prefix in PREFIXES:
        if f"{prefix}embed_tokens.weight" in names:
            return prefix
    wanted = " nor ".join(f"{prefix}embed_tokens.weight" for prefix in PREFIXES)
    raise ValueError(f"this is no Qwen3.5 text checkpoint: neither {wanted} is in it")


def mappings(config: Qwen35Config, prefix: str) -> Iterator[Mapping]:
    """Every tensor of the model, in the order of the layers. `prefix` is one of `PREFIXES`."""
    vocab_shape = (config.vocab_size, config.hidden_size)
    yield Rename(f"{prefix}embed_tokens.weight", "embedding.word_embeddings.weight", vocab_shape)
    for index, kind in enumerate(config.layer_types):
        hf, megatron = f"{prefix}layers.{index}.", f"decoder.layers.{index}."
        if kind == _LINEAR:
            yield from _gated_delta_net(config, hf, megatron)
        else:
            yield from _gated_attention(config, hf, megatron)
        yield from _mlp(config, hf, megatron)
    yield Rename(f"{prefix}norm.weight", "decoder.final_layernorm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield Rename("lm_head.weight", "output_layer.weight", vocab_shape)


def extra_state_keys(config: Qwen35Config) -> Iterator[str]:
    """Modules whose Transformer Engine version stores an `_extra_state` object, without that suffix."""
    for index, kind in enumerate(config.layer_types):
        layer = f"decoder.layers.{index}."
        attention = (
            ("in_proj", "out_norm", "out_proj")
            if kind == _LINEAR
            else ("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm")
        )
        yield from (f"{layer}self_attention.{name}." for name in attention)
        yield from (f"{layer}mlp.{name}." for name in ("linear_fc1", "linear_fc2"))
    yield "decoder.final_layernorm."


def _gated_delta_net(config: Qwen35Config, hf: str, megatron: str) -> Iterator[Mapping]:
    source, target = f"{hf}linear_attn.", f"{megatron}self_attention."
    hidden, key, value = config.hidden_size, config.key_dim, config.value_dim
    heads = config.linear_num_value_heads
    yield Rename(f"{hf}input_layernorm.weight", f"{target}in_proj.layer_norm_weight", (hidden,))
    yield SplitRows(
        f"{source}in_proj_qkv.weight",
        [(f"{target}in_proj.weight.{n}", r) for n, r in (("query", key), ("key", key), ("value", value))],
        (hidden,),
    )
    yield Rename(f"{source}in_proj_z.weight", f"{target}in_proj.weight.z", (value, hidden))
    yield Rename(f"{source}in_proj_b.weight", f"{target}in_proj.weight.beta", (heads, hidden))
    yield Rename(f"{source}in_proj_a.weight", f"{target}in_proj.weight.alpha", (heads, hidden))
    yield SplitRows(
        f"{source}conv1d.weight",
        [(f"{target}conv1d.weight.{n}", r) for n, r in (("query", key), ("key", key), ("value", value))],
        (1, config.linear_conv_kernel_dim),
    )
    yield Rename(f"{source}dt_bias", f"{target}dt_bias", (heads,))
    yield Rename(f"{source}A_log", f"{target}A_log", (heads,))
    # The only norm of the model that Hugging Face does not store zero-centred.
    yield ZeroCentred(f"{source}norm.weight", f"{target}out_norm.weight", (config.linear_value_head_dim,))
    yield Rename(f"{source}out_proj.weight", f"{target}out_proj.weight", (hidden, value))


def _gated_attention(config: Qwen35Config, hf: str, megatron: str) -> Iterator[Mapping]:
    source, target = f"{hf}self_attn.", f"{megatron}self_attention."
    hidden, head_dim = config.hidden_size, config.head_dim
    yield Rename(f"{hf}input_layernorm.weight", f"{target}linear_qkv.layer_norm_weight", (hidden,))
    yield GatedQkv(
        f"{source}q_proj.weight",
        f"{source}k_proj.weight",
        f"{source}v_proj.weight",
        f"{target}linear_qkv.weight",
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=head_dim,
        hidden=hidden,
    )
    yield Rename(f"{source}q_norm.weight", f"{target}q_layernorm.weight", (head_dim,))
    yield Rename(f"{source}k_norm.weight", f"{target}k_layernorm.weight", (head_dim,))
    yield Rename(
        f"{source}o_proj.weight", f"{target}linear_proj.weight", (hidden, config.num_attention_heads * head_dim)
    )


def _mlp(config: Qwen35Config, hf: str, megatron: str) -> Iterator[Mapping]:
    hidden, ffn = config.hidden_size, config.intermediate_size
    yield Rename(f"{hf}post_attention_layernorm.weight", f"{megatron}mlp.linear_fc1.layer_norm_weight", (hidden,))
    yield ConcatRows(
        [(f"{hf}mlp.gate_proj.weight", ffn), (f"{hf}mlp.up_proj.weight", ffn)],
        f"{megatron}mlp.linear_fc1.weight",
        (hidden,),
    )
    yield Rename(f"{hf}mlp.down_proj.weight", f"{megatron}mlp.linear_fc2.weight", (hidden, ffn))
