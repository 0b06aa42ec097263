"""Build a Megatron model from a Hugging Face `config.json`."""

from __future__ import annotations

from megatron_fp32 import needs_megatron  # noqa: F401

# isort: split
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from megatron_fp32.checkpoint.formats.directory_checks import why_no_config, why_no_directory
from megatron_fp32.checkpoint.identify import read_config
from megatron_fp32.config import Fp32Config, config_or_default
from megatron_fp32.models.specs import decoder_block_spec, mtp_block_spec
from megatron_fp32.optimizer.native_fp32 import OptimizerRepairs, install_optimizer_repairs
from megatron_fp32.output_layer.fused_loss import set_fused_loss
from megatron_fp32.output_layer.layer import to_fp32_output_layer
from megatron_fp32.validation import check_count, check_flag, check_path
from megatron_fp32.weights.families.registry import find_family
from megatron_fp32.weights.hf_config.decoder import LINEAR, DecoderConfig
from megatron_fp32.weights.hf_config.sizes import LINEAR_ATTENTION_FIELDS


def read_hf_config(hf_dir: str | Path) -> DecoderConfig:
    """Read the `config.json` in a directory.

    Raises:
        FileNotFoundError: when the directory or the file does not exist.
        ValueError: for a family or a variant that is not supported.
    """
    if not Path(hf_dir).is_dir():
        raise FileNotFoundError(why_no_directory(hf_dir))
    if not (Path(hf_dir) / "config.json").is_file():
        raise FileNotFoundError(why_no_config(Path(hf_dir)))
    hf_config = read_config(Path(hf_dir))
    try:
        return find_family(hf_config).parse(hf_config)
    except ValueError as error:
        raise ValueError(f"{hf_dir}: {error}") from error


def transformer_config(model: DecoderConfig, **overrides: Any) -> TransformerConfig:
    """megatron-core's configuration of a model.

    Args:
        model: the configuration from `read_hf_config`.
        overrides: fields of `TransformerConfig`, such as `tensor_model_parallel_size`, `sequence_parallel`, `bf16`,
            `params_dtype`, `transformer_impl` and `mtp_num_layers`. They replace the model's values.

    Raises:
        TypeError: for an override that is not a field of `TransformerConfig`, or a flag that is not a bool.
    """
    _check_overrides(overrides)
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size or model.moe_intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.rms_norm_eps,
        "layernorm_zero_centered_gamma": model.zero_centred_norms,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "qk_layernorm": model.qk_norm,
        "attention_output_gate": model.output_gate,
        "hetereogenous_dist_checkpoint": not model.is_homogeneous,
    }
    if model.has_gated_delta_net:
        fields |= {
            "experimental_attention_variant": "gated_delta_net",
            "linear_attention_freq": model.linear_attention_freq,
            **{name: getattr(model, name) for name in LINEAR_ATTENTION_FIELDS},
        }
    if model.num_experts:
        fields |= {
            "num_moe_experts": model.num_experts,
            "moe_ffn_hidden_size": model.moe_intermediate_size,
            "moe_router_topk": model.num_experts_per_tok,
            "moe_router_pre_softmax": not model.norm_topk_prob,
            "moe_layer_freq": model.moe_layer_pattern if model.dense_layers else 1,
            "moe_shared_expert_intermediate_size": model.shared_expert_intermediate_size or None,
            "moe_shared_expert_gate": model.shared_expert_intermediate_size > 0,
            "moe_grouped_gemm": True,
        }
    fields |= overrides
    if fields.get("moe_router_topk") != 1 or fields["moe_router_pre_softmax"]:
        return TransformerConfig(**fields)
    # megatron-core refuses this model, because such a router does not learn. In transformers it does not learn either.
    config = TransformerConfig(**{**fields, "moe_router_pre_softmax": True})
    config.moe_router_pre_softmax = False
    return config


def _check_overrides(overrides: dict[str, Any]) -> None:
    """Raise TypeError for names that are not fields of `TransformerConfig`, and for flags that are not bools."""
    fields = {field.name: field for field in dataclasses.fields(TransformerConfig) if field.init}
    unknown = sorted(overrides.keys() - fields.keys())
    if unknown:
        raise TypeError(f"TransformerConfig of this megatron-core has no field {', '.join(unknown)}")
    for name, value in overrides.items():
        if fields[name].type in (bool, "bool"):
            check_flag(name, value)


def cpu_overrides() -> dict[str, Any]:
    """Overrides of `transformer_config` for `testing.cpu`: the local spec, torch operators only, no fusion."""
    return {
        "transformer_impl": "local",
        "deterministic_mode": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "persist_layer_norm": False,
        "moe_grouped_gemm": False,
    }


def padded_vocab_size(vocab_size: int, tensor_parallel: int, *, divisible_by: int = 128) -> int:
    """Rows of the embedding with Megatron's padding: the next multiple of `divisible_by * tensor_parallel`."""
    for name, size in (
        ("vocab_size", vocab_size),
        ("tensor_parallel", tensor_parallel),
        ("divisible_by", divisible_by),
    ):
        check_count(name, size)
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def build_model(
    model: DecoderConfig,
    config: TransformerConfig,
    fp32: Fp32Config | None = None,
    *,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    max_sequence_length: int = 4096,
    parallel_output: bool = True,
    vocab_divisible_by: int = 128,
    pg_collection: ProcessGroupCollection | None = None,
) -> GPTModel:
    """Build a `GPTModel` that is not yet wrapped, in fp32 as `fp32` says.

    Args:
        model: the configuration from `read_hf_config`.
        config: the result of `transformer_config`. With `mtp_num_layers=1` the last stage has an MTP layer.
        fp32: what to keep in fp32.
        pre_process, post_process, vp_stage: the pipeline stage, as in megatron-core.
        max_sequence_length: tokens of the longest sequence.
        parallel_output: leave the logits vocab-parallel.
        vocab_divisible_by: see `padded_vocab_size`.
        pg_collection: process groups; None uses megatron-core's global groups.
    """
    fp32 = config_or_default(fp32, name="fp32")
    for name, flag in (("pre_process", pre_process), ("post_process", post_process)):
        check_flag(name, flag)
    check_flag("parallel_output", parallel_output)
    check_count("max_sequence_length", max_sequence_length)
    check_count("vocab_divisible_by", vocab_divisible_by)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=decoder_block_spec(config, fp32, vp_stage=vp_stage),
        vocab_size=padded_vocab_size(
            model.vocab_size, config.tensor_model_parallel_size, divisible_by=vocab_divisible_by
        ),
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_percent=model.partial_rotary_factor,
        rotary_base=model.rope_theta,
        mtp_block_spec=mtp_block_spec(config, vp_stage=vp_stage) if config.mtp_num_layers else None,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    if model.rope_scaling is not None:
        # The constructor only takes the factor; the other numbers are constants in it.
        rope = gpt.rotary_pos_emb
        rope.inv_freq = rope._apply_scaling(rope.inv_freq, **dataclasses.asdict(model.rope_scaling))
    drop_unread_head(gpt)
    if post_process and fp32.logits:
        to_fp32_output_layer(gpt.output_layer, fp32)
        set_fused_loss(gpt, fp32)
    return gpt


def drop_unread_head(model: GPTModel) -> None:
    """Remove the unused weight of a tied head on a pipeline stage with MTP. Call it before the model is wrapped.

    On a later pipeline stage with MTP, a tied head is called with the weight of the embedding that MTP has there.
    megatron-core gives the head an unused weight as well, and then refuses to load or save it (NVIDIA/Megatron-LM pull
    request 7577). Other models are not changed.
    """
    is_tied = model.share_embeddings_and_output_weights
    if is_tied and model.post_process and not model.pre_process and getattr(model, "mtp_process", False):
        model.output_layer.weight = None


class ModelProvider:
    """Builds the model of a pipeline stage when Megatron's `pretrain()` calls it. `model_provider` makes it.

    Attributes:
        optimizer_repairs: the handle of the optimizer repairs; None until the first model is built, and always where
            no parameters are kept. Call its `undo()` after the run.
    """

    def __init__(
        self,
        model: DecoderConfig,
        fp32: Fp32Config,
        overrides: dict[str, Any],
        *,
        max_sequence_length: int,
        vocab_divisible_by: int,
    ) -> None:
        self.optimizer_repairs: OptimizerRepairs | None = None
        self._model, self._fp32, self._overrides = model, fp32, overrides
        self._max_sequence_length, self._vocab_divisible_by = max_sequence_length, vocab_divisible_by
        # Decided for the whole model, because a pipeline stage without such a layer must save and load like the others.
        self.__name__ = "megatron_fp32_model_provider"
        self._keeps_parameters = bool(fp32.gated_delta_net) and LINEAR in model.layer_types

    def __copy__(self) -> ModelProvider:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelProvider:
        """Itself, as a function is: frameworks copy their configurations, and the handle must stay reachable."""
        return self

    def __call__(
        self,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        config: TransformerConfig | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> GPTModel:
        """Build the model of a pipeline stage. It is not yet wrapped.

        Args:
            pre_process, post_process, vp_stage: the pipeline stage, as in megatron-core.
            config: replaces the provider's own configuration; newer releases of Megatron pass it.
            pg_collection: process groups; None uses megatron-core's global groups.
        """
        built = build_model(
            self._model,
            config if config is not None else transformer_config(self._model, **self._overrides),
            self._fp32,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            max_sequence_length=self._max_sequence_length,
            vocab_divisible_by=self._vocab_divisible_by,
            pg_collection=pg_collection,
        )
        if self.optimizer_repairs is None and self._keeps_parameters:
            self.optimizer_repairs = install_optimizer_repairs()
        return built


def model_provider(
    hf_dir: str | Path,
    *,
    fp32: Fp32Config | None = None,
    max_sequence_length: int = 4096,
    vocab_divisible_by: int = 128,
    **overrides: Any,
) -> ModelProvider:
    """Make a model provider for Megatron: `provider(pre_process, post_process, vp_stage, config, pg_collection)`.

    If parameters are kept, the provider also installs the optimizer repairs on every rank: without them, the optimizer
    of such a model cannot save. See `ModelProvider.optimizer_repairs`.

    Args:
        hf_dir: directory with the model's `config.json`.
        fp32: what to keep in fp32.
        max_sequence_length: tokens of the longest sequence.
        vocab_divisible_by: Megatron's `--make-vocab-size-divisible-by`; see `padded_vocab_size`.
        overrides: fields of `TransformerConfig`; see `transformer_config`.

    Raises:
        ValueError: for a model that is not supported, or an override that the model does not allow.
        TypeError: for an argument of another type.
    """
    check_path("hf_dir", hf_dir)
    fp32 = config_or_default(fp32, name="fp32")
    check_count("max_sequence_length", max_sequence_length)
    check_count("vocab_divisible_by", vocab_divisible_by)
    _check_overrides(overrides)
    model = read_hf_config(hf_dir)
    dtype = torch.bfloat16 if overrides.get("bf16") else torch.float16 if overrides.get("fp16") else torch.float32
    return ModelProvider(
        model,
        fp32,
        {"params_dtype": dtype, **overrides},
        max_sequence_length=max_sequence_length,
        vocab_divisible_by=vocab_divisible_by,
    )
