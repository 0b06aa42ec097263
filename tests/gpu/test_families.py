"""Families whose layers Transformer Engine has modules of its own for: grouped experts, layers that are all alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from megatron.core import dist_checkpointing
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.testing.training import load_model
from tests.checkpoint.support import stored_tensors
from tests.families import Case, case
from tests.gpu.models import build

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_megatron")]

NAMES = ("Llama", "Qwen3, tied", "Qwen3-MoE", "Qwen3-MoE, a dense layer", "Qwen3-Next", "Qwen3.5-VL-MoE")


@pytest.mark.parametrize("case", [case(name) for name in NAMES], ids=lambda case: case.name)
def test_every_byte_comes_back_through_transformer_engine(tmp_path: Path, case: Case) -> None:
    hf = case.write(tmp_path / "source")
    import_checkpoint(hf, tmp_path / "megatron", vision="carry" if case.outer else "refuse")
    model = build(hf, mtp_num_layers=1 if case.mtp else None)
    Float16Module(model.config, model)  # casts in place
    load_model(model, tmp_path / "megatron" / "release", strict="raise_all")
    (tmp_path / "trained").mkdir()
    state = {"model": model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group({}))}
    dist_checkpointing.save(state, str(tmp_path / "trained"))
    export_checkpoint(tmp_path / "trained", tmp_path / "hf", source=tmp_path / "megatron")
    assert stored_tensors(tmp_path / "hf") == stored_tensors(hf)
