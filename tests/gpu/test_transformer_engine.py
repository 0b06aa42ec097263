"""The package under Transformer Engine and flash-linear-attention: keys, precision, training, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_fp32.apply import apply_fp32
from megatron_fp32.check import check_fp32
from megatron_fp32.checkpoint.convert import export_checkpoint
from megatron_fp32.config import Fp32Config
from megatron_fp32.kept_parameters.keep_in_fp32 import kept_parameters
from megatron_fp32.optimizer.native_fp32 import install_optimizer_repairs
from megatron_fp32.testing.qwen3_5 import load_qwen3_5
from megatron_fp32.testing.training import Batch, Trainer, TrainerConfig, load_model
from tests.gpu.models import build

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_megatron")]

VOCAB = 1000


def keys(model: torch.nn.Module) -> set[str]:
    state = model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group({}))
    return {entry.key for entry in state.values()}


def test_local_and_transformer_engine_specs_have_the_same_checkpoint_keys(checkpoints: tuple[Path, Path]) -> None:
    local = build(checkpoints[0], transformer_impl="local", persist_layer_norm=False)
    assert keys(local) == keys(build(checkpoints[0]))


@pytest.mark.parametrize("spec", ["transformer_engine", "local"])
def test_an_import_loads_at_the_highest_strictness(checkpoints: tuple[Path, Path], spec: str) -> None:
    hf, megatron = checkpoints
    model = build(hf, transformer_impl=spec, persist_layer_norm=False)
    load_model(model, megatron / "release", strict="raise_all")
    reference = load_qwen3_5(hf).state_dict()
    a_log = model.decoder.layers[0].self_attention.A_log
    assert torch.equal(a_log.cpu(), reference["model.layers.0.linear_attn.A_log"])


@pytest.mark.parametrize("spec", ["transformer_engine", "local"])
def test_logits_agree_with_transformers(checkpoints: tuple[Path, Path], spec: str) -> None:
    hf, megatron = checkpoints
    tokens = Batch.random(VOCAB, length=128).tokens.cuda()
    with torch.no_grad():
        truth = load_qwen3_5(hf).cuda()(tokens).logits
        theirs = load_qwen3_5(hf, torch.bfloat16).cuda()(tokens).logits
    model = build(hf, transformer_impl=spec, persist_layer_norm=False)
    load_model(model, megatron / "release")
    ours = Trainer(model).logits(tokens)[..., :VOCAB]
    assert ours.dtype == torch.float32
    # transformers in bf16 rounds A_log and the logits besides; with those kept we must not be worse.
    assert (ours - truth).norm() < 1.1 * (theirs - truth).norm()


def test_kept_parameters_stay_fp32_and_exact_through_wrapping(checkpoints: tuple[Path, Path]) -> None:
    hf, megatron = checkpoints
    model = build(hf)
    load_model(model, megatron / "release")
    before = {name: p.detach().clone() for name, p in kept_parameters(model)}
    assert len(before) == 6
    Float16Module(model.config, model)
    after = dict(kept_parameters(model))
    assert all(torch.equal(after[name], value) and after[name].dtype == torch.float32 for name, value in before.items())


@pytest.mark.parametrize("sharding", ["dp_reshardable", "fully_reshardable"])
def test_training_saves_and_loads_every_bit(checkpoints: tuple[Path, Path], tmp_path: Path, sharding: str) -> None:
    hf, megatron = checkpoints
    batches = [Batch.random(VOCAB, length=128, seed=seed).to("cuda") for seed in range(2)]
    with install_optimizer_repairs():
        trainer = Trainer(build(hf), TrainerConfig(sharding=sharding))
        trainer.load_model(megatron / "release")
        losses = [trainer.step(batches) for _ in range(4)]
        assert losses[-1] < losses[0]
        for layer in trainer.model.decoder.layers[:3]:
            assert layer.self_attention.fp32_calls == 8
        assert trainer.model.output_layer.fp32_calls == 8
        trainer.save(tmp_path)
        resumed = Trainer(build(hf), TrainerConfig(sharding=sharding))
        resumed.load(tmp_path)
    for (name, a), (_, b) in zip(trainer.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    states = list(trainer.optimizer_tensors())
    assert len(states) > 2 * len(list(trainer.model.parameters()))
    for (name, a), (other, b) in zip(states, resumed.optimizer_tensors(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_a_stock_model_can_be_changed_after_it_was_built(checkpoints: tuple[Path, Path]) -> None:
    hf, megatron = checkpoints
    model = build(hf, Fp32Config(logits=False, gated_delta_net=()))
    stock = keys(model)
    report = apply_fp32(model, weights="initialized")
    assert report.output_layers == ("output_layer",)
    assert keys(model) == stock
    with install_optimizer_repairs():
        trainer = Trainer(model)
        load_model(model, megatron / "release", strict="raise_all")
        reference = load_qwen3_5(hf).state_dict()
        a_log = model.decoder.layers[0].self_attention.A_log
        assert torch.equal(a_log.cpu(), reference["model.layers.0.linear_attn.A_log"])
        trainer.step([Batch.random(VOCAB, length=128).to("cuda")])
        check_fp32(trainer.model, optimizer=trainer.optimizer, after_forward=True)


def test_saved_without_a_step_exports_byte_equal(checkpoints: tuple[Path, Path], tmp_path: Path) -> None:
    hf, megatron = checkpoints
    model = build(hf)
    Float16Module(model.config, model)
    load_model(model, megatron / "release")
    saved = tmp_path / "saved"
    saved.mkdir()
    state = model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group({}))
    dist_checkpointing.save({"model": state}, str(saved))
    report = export_checkpoint(saved, tmp_path / "hf", source=megatron)
    assert report.unchanged == report.tensors


def test_stock_loses_the_bits_that_are_kept_here(checkpoints: tuple[Path, Path]) -> None:
    """Without the package the same steps round A_log: the tests above can fail."""
    hf, megatron = checkpoints
    model = build(hf, Fp32Config(logits=False, gated_delta_net=()))
    Float16Module(model.config, model)
    load_model(model, megatron / "release")
    a_log = model.decoder.layers[0].self_attention.A_log
    truth = load_qwen3_5(hf).state_dict()["model.layers.0.linear_attn.A_log"]
    assert a_log.dtype == torch.bfloat16
    assert not torch.equal(a_log.float().cpu(), truth)
