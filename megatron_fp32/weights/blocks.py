"""The parts that decoders are made of, each as mappings between Hugging Face's names and megatron-core's.

Every function takes the configuration and what the names of one layer start with on either side (`hf`, `megatron`). The
Megatron keys are those of the Transformer Engine spec, with one set for each layer. `stacking.stack_layers` turns them
into the keys that megatron-core stores when all layers are alike.

Sources: transformers `models/<family>/modeling_*.py`; megatron-core `ssm/gated_delta_net` (rows of `in_proj` and
`conv1d`), `transformer/attention.py` (rows of `linear_qkv`), `transformer/mlp.py` (gate before up),
`transformer/moe/experts.py` (keys and shapes of experts), `transformer/multi_token_prediction.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron_fp32.weights.experts import DOWN, GATE_UP, expert_prefix
from megatron_fp32.weights.hf_config.decoder import LINEAR, DecoderConfig
from megatron_fp32.weights.mapping import (
    TensorMapping,
    concat_rows,
    gated_qkv,
    rename,
    shared,
    split_rows,
    transposed,
    zero_centred,
)
from megatron_fp32.weights.naming import HEAD, MTP, Naming
from megatron_fp32.weights.spec import TensorSpec

InProj = Callable[[DecoderConfig, str, str], Iterator[TensorMapping]]
"""How a family stores the input projections of a gated delta net: one of `separate_in_proj`, `grouped_in_proj`."""


def decoder(config: DecoderConfig, naming: Naming, *, in_proj: InProj | None = None) -> Iterator[TensorMapping]:
    """Every tensor of a decoder, in the order of the layers, and of its MTP layer.

    Args:
        config: the shapes.
        naming: of the Hugging Face checkpoint.
        in_proj: for families with gated delta nets.
    """
    prefix, vocab_shape = naming.prefix, (config.vocab_size, config.hidden_size)
    embedding, word_embeddings = f"{prefix}embed_tokens.weight", "embedding.word_embeddings.weight"
    if config.tie_word_embeddings and naming.head:
        yield shared((embedding, HEAD), word_embeddings, vocab_shape)
    else:
        yield rename(embedding, word_embeddings, vocab_shape)
    for index, (kind, is_moe) in enumerate(zip(config.layer_types, config.moe_layer_pattern, strict=True)):
        hf, megatron = f"{prefix}layers.{index}.", f"decoder.layers.{index}."
        if kind != LINEAR:
            yield from attention(config, hf, megatron)
        elif in_proj is not None:
            yield from gated_delta_net(config, hf, megatron, in_proj)
        else:
            raise ValueError(f"layer {index} is a gated delta net, which this family does not have")
        if is_moe:
            yield from mixture_of_experts(config, hf, megatron, naming, fused=naming.fused_experts)
        else:
            yield from mlp(config, hf, megatron)
    yield rename(f"{prefix}norm.weight", "decoder.final_layernorm.weight", (config.hidden_size,))
    if not config.tie_word_embeddings:
        yield rename(HEAD, "output_layer.weight", vocab_shape)
    yield from multi_token_prediction(config, naming)


def attention(config: DecoderConfig, hf: str, megatron: str) -> Iterator[TensorMapping]:
    """Softmax attention, with an output gate and norms of q and k where the configuration says so."""
    source, target = f"{hf}self_attn.", f"{megatron}self_attention."
    hidden, head_dim = config.hidden_size, config.head_dim
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    q, k, v = (f"{source}{name}_proj.weight" for name in "qkv")
    qkv = f"{target}linear_qkv.weight"
    yield rename(f"{hf}input_layernorm.weight", f"{target}linear_qkv.layer_norm_weight", (hidden,))
    if config.output_gate:
        yield gated_qkv(q, k, v, qkv, heads=heads, groups=groups, head_dim=head_dim, hidden=hidden)
    else:
        rows = [(q, heads * head_dim), (k, groups * head_dim), (v, groups * head_dim)]
        yield concat_rows(rows, qkv, (hidden,), groups=groups)
    if config.qk_norm:
        yield rename(f"{source}q_norm.weight", f"{target}q_layernorm.weight", (head_dim,))
        yield rename(f"{source}k_norm.weight", f"{target}k_layernorm.weight", (head_dim,))
    yield rename(f"{source}o_proj.weight", f"{target}linear_proj.weight", (hidden, heads * head_dim))


def gated_delta_net(config: DecoderConfig, hf: str, megatron: str, in_proj: InProj) -> Iterator[TensorMapping]:
    """A gated-delta-net layer."""
    source, target = f"{hf}linear_attn.", f"{megatron}self_attention."
    hidden, value, heads = config.hidden_size, config.value_dim, config.linear_num_value_heads
    yield rename(f"{hf}input_layernorm.weight", f"{target}in_proj.layer_norm_weight", (hidden,))
    yield from in_proj(config, source, f"{target}in_proj.weight.")
    yield split_rows(
        f"{source}conv1d.weight", _q_k_v(config, f"{target}conv1d.weight."), (1, config.linear_conv_kernel_dim)
    )
    yield rename(f"{source}dt_bias", f"{target}dt_bias", (heads,))
    yield rename(f"{source}A_log", f"{target}A_log", (heads,))
    # The only norm that Hugging Face stores as it is where the others are zero-centred; megatron-core has one setting.
    norm = zero_centred if config.zero_centred_norms else rename
    yield norm(f"{source}norm.weight", f"{target}out_norm.weight", (config.linear_value_head_dim,))
    yield rename(f"{source}out_proj.weight", f"{target}out_proj.weight", (hidden, value))


def separate_in_proj(config: DecoderConfig, source: str, target: str) -> Iterator[TensorMapping]:
    """`in_proj_qkv` [q | k | v], `in_proj_z`, `in_proj_b`, `in_proj_a`."""
    row = (config.hidden_size,)
    yield split_rows(f"{source}in_proj_qkv.weight", _q_k_v(config, target), row)
    yield rename(f"{source}in_proj_z.weight", f"{target}z", (config.value_dim, *row))
    yield rename(f"{source}in_proj_b.weight", f"{target}beta", (config.linear_num_value_heads, *row))
    yield rename(f"{source}in_proj_a.weight", f"{target}alpha", (config.linear_num_value_heads, *row))


def grouped_in_proj(config: DecoderConfig, source: str, target: str) -> Iterator[TensorMapping]:
    """`in_proj_qkvz` and `in_proj_ba`: for each key head [q | k | v of its value heads | z of them], [b | a]."""
    groups, row = config.linear_num_key_heads, (config.hidden_size,)
    qkvz = [*_q_k_v(config, target), (f"{target}z", config.value_dim)]
    yield split_rows(f"{source}in_proj_qkvz.weight", qkvz, row, groups=groups)
    ba = [(f"{target}{name}", config.linear_num_value_heads) for name in ("beta", "alpha")]
    yield split_rows(f"{source}in_proj_ba.weight", ba, row, groups=groups)


def _q_k_v(config: DecoderConfig, target: str) -> list[tuple[str, int]]:
    rows = (("query", config.key_dim), ("key", config.key_dim), ("value", config.value_dim))
    return [(f"{target}{name}", count) for name, count in rows]


def mlp(config: DecoderConfig, hf: str, megatron: str) -> Iterator[TensorMapping]:
    """A dense MLP and the norm before it."""
    norm = f"{megatron}mlp.linear_fc1.layer_norm_weight"
    yield rename(f"{hf}post_attention_layernorm.weight", norm, (config.hidden_size,))
    yield from _gated_mlp(config.hidden_size, config.intermediate_size, f"{hf}mlp.", f"{megatron}mlp.")


def mixture_of_experts(
    config: DecoderConfig, hf: str, megatron: str, naming: Naming, *, fused: bool
) -> Iterator[TensorMapping]:
    """Router, experts, the shared expert and its gate, and the norm before them.

    megatron-core stacks the experts; each is a mapping of its own here. `fused` says that Hugging Face does too, here.
    """
    hidden, count = config.hidden_size, config.num_experts
    yield rename(f"{hf}post_attention_layernorm.weight", f"{megatron}pre_mlp_layernorm.weight", (hidden,))
    yield rename(f"{hf}mlp.gate.weight", f"{megatron}mlp.router.weight", (count, hidden))
    for expert in range(count):
        place = _in_stack(expert, count)
        experts = _fused_expert(config, hf, megatron, naming) if fused else _expert(config, hf, megatron, expert)
        for mapping in experts:
            yield mapping.place(hf=place if fused else None, megatron=place)
    if config.shared_expert_intermediate_size:
        source, target = f"{hf}mlp.shared_expert", f"{megatron}mlp.shared_experts."
        yield from _gated_mlp(hidden, config.shared_expert_intermediate_size, f"{source}.", target)
        yield rename(f"{source}_gate.weight", f"{target}gate_weight", (1, hidden))


def _in_stack(index: int, size: int) -> Callable[[TensorSpec], TensorSpec]:
    return lambda spec: spec.in_stack(index, size)


def _fused_expert(config: DecoderConfig, hf: str, megatron: str, naming: Naming) -> Iterator[TensorMapping]:
    # Both sides hold gate, then up.
    source, target = f"{hf}mlp.experts.", f"{megatron}mlp.experts.experts."
    hidden, ffn = config.hidden_size, config.moe_intermediate_size
    copy = transposed if naming.transposed_experts else rename
    yield copy(f"{source}{GATE_UP}", f"{target}linear_fc1.weight", (2 * ffn, hidden))
    yield copy(f"{source}{DOWN}", f"{target}linear_fc2.weight", (hidden, ffn))


def _expert(config: DecoderConfig, hf: str, megatron: str, index: int) -> Iterator[TensorMapping]:
    source, target = expert_prefix(f"{hf}mlp.", index), f"{megatron}mlp.experts.experts."
    yield from _gated_mlp(config.hidden_size, config.moe_intermediate_size, source, target)


def _gated_mlp(hidden: int, ffn: int, source: str, target: str) -> Iterator[TensorMapping]:
    gate_up = [(f"{source}gate_proj.weight", ffn), (f"{source}up_proj.weight", ffn)]
    yield concat_rows(gate_up, f"{target}linear_fc1.weight", (hidden,))
    yield rename(f"{source}down_proj.weight", f"{target}linear_fc2.weight", (hidden, ffn))


def multi_token_prediction(config: DecoderConfig, naming: Naming) -> Iterator[TensorMapping]:
    """The MTP layer: full attention, with experts where the decoder has any.

    `fc` and `eh_proj` both take [embedding | hidden state] (vLLM `qwen3_next_mtp.py`).

    Raises:
        ValueError: for several layers: Hugging Face's share `fc` and the norms around it, megatron-core's do not.
    """
    if naming.mtp_layers > 1:
        raise ValueError(f"{naming.mtp_layers} MTP layers; one can be converted")
    if not naming.mtp_layers:
        return
    megatron, hidden = "mtp.layers.0.", config.hidden_size
    yield rename(f"{MTP}pre_fc_norm_embedding.weight", f"{megatron}enorm.weight", (hidden,))
    yield rename(f"{MTP}pre_fc_norm_hidden.weight", f"{megatron}hnorm.weight", (hidden,))
    yield rename(f"{MTP}fc.weight", f"{megatron}eh_proj.weight", (hidden, 2 * hidden))
    layer = (config, f"{MTP}layers.0.", f"{megatron}transformer_layer.")
    yield from attention(*layer)
    if config.num_experts:
        yield from mixture_of_experts(*layer, naming, fused=naming.fused_mtp_experts)
    else:
        yield from mlp(*layer)
    yield rename(f"{MTP}norm.weight", f"{megatron}final_layernorm.weight", (hidden,))
