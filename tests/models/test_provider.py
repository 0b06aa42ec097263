from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel, experimental_attention_variant_module_specs, gpt_layer_specs
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from transformers.models.qwen3_5 import Qwen3_5TextConfig

from megatron_fp32.config import Fp32Config
from megatron_fp32.gated_delta_net.layer import Fp32GatedDeltaNet
from megatron_fp32.models import provider, specs
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from megatron_fp32.output_layer.layer import Fp32OutputLayer
from megatron_fp32.testing.cpu import model_parallel
from megatron_fp32.testing.ranks import RankPool
from megatron_fp32.weights.families.registry import find_family
from megatron_fp32.weights.hf_config.decoder import FULL, LINEAR, DecoderConfig
from megatron_fp32.weights.hf_config.rotary import Llama3RopeScaling
from tests.families import case
from tests.qwen3_5 import tiny_qwen3_5


def _config(**overrides: Any) -> Any:
    return provider.transformer_config(tiny_qwen3_5(), **{**provider.cpu_overrides(), **overrides})


def _attention_modules(spec: Any) -> list[type]:
    return [layer.submodules.self_attention.module for layer in spec.layer_specs]


def _parsed(name: str) -> DecoderConfig:
    hf = case(name).text_config().to_dict()
    return find_family(hf).parse(hf)


@pytest.mark.usefixtures("megatron")
def test_the_configuration_says_what_the_model_is() -> None:
    model = tiny_qwen3_5(rms_norm_eps=3e-5, layer_types=("full_attention", "linear_attention", "linear_attention"))
    config = provider.transformer_config(model)
    assert (config.num_layers, config.hidden_size, config.ffn_hidden_size) == (3, 64, 96)
    assert (config.num_attention_heads, config.num_query_groups, config.kv_channels) == (4, 2, 16)
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (2, 4)
    assert (config.linear_key_head_dim, config.linear_value_head_dim, config.linear_conv_kernel_dim) == (16, 16, 4)
    assert config.linear_attention_freq == [0, 1, 1]
    assert config.layernorm_epsilon == 3e-5
    assert config.layernorm_zero_centered_gamma
    assert config.normalization == "RMSNorm"
    assert config.attention_output_gate
    assert config.qk_layernorm
    assert not config.add_bias_linear
    assert config.activation_func is torch.nn.functional.silu


def test_overrides_win_over_the_model() -> None:
    config = _config(hidden_dropout=0.5, ffn_hidden_size=32, params_dtype=torch.bfloat16)
    assert (config.hidden_dropout, config.ffn_hidden_size, config.params_dtype) == (0.5, 32, torch.bfloat16)


@pytest.mark.parametrize(
    ("vocab", "tensor_parallel", "divisible_by", "padded"),
    [(1, 1, 128, 128), (128, 1, 128, 128), (129, 1, 128, 256), (129, 2, 128, 256), (257, 2, 128, 512), (57, 3, 1, 57),
     (58, 3, 1, 60)],
)  # fmt: skip
def test_the_vocabulary_is_padded_as_megatron_pads_it(
    vocab: int, tensor_parallel: int, divisible_by: int, padded: int
) -> None:
    assert provider.padded_vocab_size(vocab, tensor_parallel, divisible_by=divisible_by) == padded


@pytest.fixture
def hf_dir(tmp_path: Path) -> Path:
    Qwen3_5TextConfig(
        vocab_size=57, hidden_size=32, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=4,
        linear_value_head_dim=4, layer_types=["linear_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5},
    ).save_pretrained(tmp_path)  # fmt: skip
    return tmp_path


@pytest.fixture(autouse=True)
def _stock_optimizers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Providers install the optimizer repairs for the rest of the process; here they are taken back after each test."""
    with contextlib.ExitStack() as undo:
        monkeypatch.setattr(
            provider, "install_optimizer_repairs", lambda: undo.enter_context(install_optimizer_repairs())
        )
        yield


@pytest.mark.usefixtures("megatron")
def test_a_provider_that_keeps_parameters_installs_the_optimizer_repairs(hf_dir: Path) -> None:
    options = {**provider.cpu_overrides(), "bf16": True}
    nothing = provider.model_provider(hf_dir, fp32=Fp32Config(gated_delta_net=()), **options)
    nothing()
    assert nothing.optimizer_repairs is None
    provide = provider.model_provider(hf_dir, **options)
    assert provide.optimizer_repairs is None  # nothing is patched before a model is built
    for _ in range(2):
        provide()
        with install_optimizer_repairs() as others:
            assert others.installed == ()
    assert "float16-id-map" in provide.optimizer_repairs.installed
    provide.optimizer_repairs.undo()
    with install_optimizer_repairs() as again:
        assert again.installed == provide.optimizer_repairs.installed


@pytest.mark.usefixtures("megatron")
def test_a_provider_builds_the_model_of_a_config_file(hf_dir: Path) -> None:
    provide = provider.model_provider(hf_dir, **provider.cpu_overrides(), bf16=True)
    model = provide(pre_process=True, post_process=True)
    assert isinstance(model, GPTModel)
    assert model.embedding.word_embeddings.weight.shape == (128, 32)
    assert model.embedding.word_embeddings.weight.dtype == torch.bfloat16
    assert model.rotary_pos_emb.inv_freq.tolist() == pytest.approx([1.0, 5e5**-0.5])  # half of 8 dimensions rotate
    assert isinstance(model.output_layer, Fp32OutputLayer)
    attention = [layer.self_attention for layer in model.decoder.layers]
    assert isinstance(attention[0], Fp32GatedDeltaNet)
    assert not isinstance(attention[1], GatedDeltaNet)
    assert attention[0].A_log.dtype == attention[0].out_norm.weight.dtype == torch.float32
    assert attention[0].dt_bias.dtype == torch.bfloat16


@pytest.mark.usefixtures("megatron")
def test_a_providers_overrides_win(hf_dir: Path) -> None:
    options = {**provider.cpu_overrides(), "bf16": True, "params_dtype": torch.float32, "ffn_hidden_size": 12}
    model = provider.model_provider(hf_dir, fp32=Fp32Config(logits=False), **options)(post_process=True)
    assert model.decoder.layers[0].mlp.linear_fc2.weight.shape == (32, 12)
    assert model.decoder.layers[0].mlp.linear_fc2.weight.dtype == torch.float32
    assert not isinstance(model.output_layer, Fp32OutputLayer)


@pytest.mark.usefixtures("megatron")
def test_a_stage_without_the_head_or_the_embedding_builds(hf_dir: Path) -> None:
    model = provider.model_provider(hf_dir, **provider.cpu_overrides())(pre_process=False, post_process=False)
    assert not hasattr(model, "embedding")
    assert not hasattr(model, "output_layer")


def test_a_missing_config_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        provider.model_provider(tmp_path)


def test_a_config_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2'"):
        provider.model_provider(tmp_path)


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize(
    ("field", "value"),
    [("experimental_attention_variant", "dsa"), ("transformer_impl", "inference_optimized")],
)
def test_a_spec_for_another_model_or_backend_is_refused(field: str, value: Any) -> None:
    config = _config()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=f"expected {field}.*got {value!r}"):
        specs.decoder_block_spec(config)


@pytest.mark.usefixtures("megatron")
def test_the_fp32_layer_is_put_into_a_copy_of_the_spec() -> None:
    stock = specs.decoder_block_spec(_config(), Fp32Config(gated_delta_net=()))
    before = repr(stock)  # a copy would not be equal: specs hold functools.partial objects
    ours = specs.with_fp32_gated_delta_net(stock, Fp32Config(gated_delta_net=("A_log",)))
    assert repr(stock) == before
    assert _attention_modules(stock)[0] is GatedDeltaNet
    assert _attention_modules(ours)[0] is Fp32GatedDeltaNet
    assert _attention_modules(ours)[1] is _attention_modules(stock)[1]
    assert ours.layer_specs[0].submodules.self_attention.params["fp32_parameters"] == ("A_log",)


@pytest.mark.usefixtures("megatron")
def test_keeping_nothing_leaves_megatrons_class() -> None:
    model = provider.build_model(
        tiny_qwen3_5(), _config(bf16=True, params_dtype=torch.bfloat16), Fp32Config(gated_delta_net=())
    )
    layer = model.decoder.layers[0].self_attention
    assert type(layer) is GatedDeltaNet
    assert layer.A_log.dtype == torch.bfloat16


_MODELS = {
    "Qwen3.5": tiny_qwen3_5(rope_theta=1e7, layer_types=("linear_attention",) * 3 + ("full_attention",)),
    **{
        name: _parsed(name)
        for name in ("Qwen3-Next", "Qwen3-Next, plain probabilities, tied, a dense layer", "Qwen3.5-MoE", "Qwen3, tied",
                     "Qwen3-MoE", "Qwen3-MoE, a dense layer", "Llama without scaling")
    },
}  # fmt: skip


@pytest.mark.parametrize("model", _MODELS.values(), ids=_MODELS)
def test_the_flags_for_megatrons_parser_make_the_same_configuration(
    monkeypatch: pytest.MonkeyPatch, model: DecoderConfig
) -> None:
    arguments = pytest.importorskip("megatron.training.arguments", reason="megatron-core < 0.17 brings no training")
    if not hasattr(arguments, "parse_and_validate_args"):
        pytest.skip("read in megatron-core 0.19.2")
    args, theirs = _parse(monkeypatch, arguments, model)
    ours = provider.transformer_config(model, params_dtype=torch.bfloat16, bf16=True, transformer_impl="local")
    for name in MODEL_FIELDS:
        assert getattr(theirs, name) == getattr(ours, name), name
    assert args.rotary_base == model.rope_theta
    assert (args.rotary_percent, args.vocab_size) == (model.partial_rotary_factor, model.vocab_size)
    assert args.untie_embeddings_and_output_weights is not model.tie_word_embeddings
    assert not args.use_rope_scaling


def test_llama_3_1_has_flags_for_its_rotary_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = pytest.importorskip("megatron.training.arguments", reason="megatron-core < 0.17 brings no training")
    if not hasattr(arguments, "parse_and_validate_args"):
        pytest.skip("read in megatron-core 0.19.2")
    scaling = Llama3RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    args, _ = _parse(monkeypatch, arguments, dataclasses.replace(_parsed("Llama"), rope_scaling=scaling))
    assert (args.use_rope_scaling, args.rope_scaling_factor) == (True, 32.0)


@pytest.mark.parametrize("theta", [26914.64, 0.5, 1e7 + 0.25])
def test_a_rotary_base_with_a_fraction_has_no_flag(theta: float) -> None:
    model = dataclasses.replace(_parsed("Qwen3"), rope_theta=theta)
    with pytest.raises(
        ValueError, match=rf"--rotary-base takes whole numbers, but this model has rope_theta={theta!r}"
    ):
        model.megatron_arguments()


@pytest.mark.parametrize("theta", [10000.0, 500000, 1e7])
def test_a_whole_rotary_base_is_a_flag(theta: float) -> None:
    flags = dataclasses.replace(_parsed("Qwen3"), rope_theta=theta).megatron_arguments()
    assert float(flags[flags.index("--rotary-base") + 1]) == theta


def _parse(monkeypatch: pytest.MonkeyPatch, arguments: Any, model: DecoderConfig) -> tuple[Any, Any]:
    run = "--seq-length 8 --max-position-embeddings 8 --micro-batch-size 1 --train-iters 1 --lr 1 --bf16"
    run += " --transformer-impl local --no-rope-fusion --no-persist-layer-norm --tokenizer-type NullTokenizer"
    monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *model.megatron_arguments(), *run.split()])
    args = arguments.parse_args()
    arguments.validate_args(args, {})
    return args, arguments.core_transformer_config_from_args(args)


# What transformer_config derives from a model.
MODEL_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit", "activation_func",
    "add_bias_linear", "hidden_dropout", "attention_dropout", "qk_layernorm", "attention_output_gate",
    "experimental_attention_variant", "linear_attention_freq", "linear_conv_kernel_dim", "linear_key_head_dim",
    "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads", "num_moe_experts",
    "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax", "moe_layer_freq",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
)  # fmt: skip


@pytest.mark.usefixtures("megatron")
def test_a_provider_takes_what_megatrons_get_model_gives(hf_dir: Path) -> None:
    """`get_model` of megatron.training 0.18 and newer passes these two as keywords."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    provide = provider.model_provider(hf_dir, **provider.cpu_overrides(), bf16=True)
    config, groups = _config(hidden_size=64), ProcessGroupCollection.use_mpu_process_groups()
    model = provide(pre_process=True, post_process=True, config=None, pg_collection=groups)
    assert model.pg_collection is groups
    assert model.config is not config
    assert provide(True, True, config=model.config, pg_collection=groups).config is model.config


_MTP_STAGES = {
    "attention on both stages": ((FULL, FULL), (), {}),
    "a first stage of gated delta nets": ((LINEAR, FULL), (), {}),
    "a last stage of gated delta nets": ((FULL, LINEAR), (), {}),
    "a last stage without layers": ((LINEAR, FULL), (), {"pipeline_model_parallel_layout": "Ett|mL"}),
    "a last layer without experts": ((FULL, FULL), (1,), {}),
}


@pytest.mark.parametrize(("layers", "dense", "options"), _MTP_STAGES.values(), ids=_MTP_STAGES)
def test_under_transformer_engine_mtp_has_attention_and_experts_whatever_the_layers_of_its_stage(
    ranks: Callable[[int], RankPool], layers: tuple[str, ...], dense: tuple[int, ...], options: dict[str, Any]
) -> None:
    model = dataclasses.replace(_parsed("Qwen3-Next"), layer_types=layers, dense_layers=dense)
    first, last = ranks(2).run(_mtp_parts, model, options)
    assert first is None
    attention, mlp = last
    assert "GatedDeltaNet" not in attention
    assert "SelfAttention" in attention
    assert "MoELayer" in mlp


def _mtp_parts(model: DecoderConfig, options: dict[str, Any]) -> tuple[str, str] | None:
    """Attention and MLP of the MTP layer on this one of two stages; local modules stand in for Transformer Engine's."""
    with model_parallel(pipeline=2), contextlib.ExitStack() as stack:
        for module in (gpt_layer_specs, experimental_attention_variant_module_specs):
            stack.enter_context(mock.patch.object(module, "TESpecProvider", LocalSpecProvider, create=True))
        overrides = {"mtp_num_layers": 1, "pipeline_model_parallel_size": 2, "pipeline_dtype": torch.float32, **options}
        config = provider.transformer_config(
            model, **{**provider.cpu_overrides(), "transformer_impl": "transformer_engine", **overrides}
        )
        block = specs.mtp_block_spec(config)
    if block is None:
        return None
    parts = block.layer_specs[0].submodules
    layer = getattr(parts, "mtp_model_layer", None) or parts.transformer_layer  # its name up to megatron-core 0.16
    return repr(layer.submodules.self_attention), repr(layer.submodules.mlp)


@pytest.mark.usefixtures("megatron")
def test_the_provider_takes_the_padding_and_the_length_of_a_launch_line(hf_dir: Path) -> None:
    provide = provider.model_provider(hf_dir, max_sequence_length=17, vocab_divisible_by=1, **provider.cpu_overrides())
    assert isinstance(provide, provider.ModelProvider)
    built = provide()
    assert built.max_sequence_length == 17
    assert built.vocab_size == provider.read_hf_config(hf_dir).vocab_size
    assert "fp32_parameters=('A_log', 'out_norm.weight')" in repr(built)
    with pytest.raises(TypeError, match="max_sequence_length must be an int, got '17'"):
        provider.model_provider(hf_dir, max_sequence_length="17")  # type: ignore[arg-type]
