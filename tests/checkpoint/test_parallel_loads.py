"""What an import makes, loaded by megatron-core on the ranks of every kind of layout, as strictly as it can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from megatron_fp32.checkpoint.convert import export_checkpoint
from megatron_fp32.config import Fp32Config
from megatron_fp32.models import provider
from megatron_fp32.testing.ranks import RankPool
from tests.checkpoint.layouts import KNOWS_COMMON_STATE, STRICTNESS, Layout, build, load, logits, on_ranks, pass_through
from tests.checkpoint.support import assert_parity, stored_tensors
from tests.conftest import Families
from tests.families import Case, case
from tests.support import STOCK

Ranks = Callable[[int], RankPool]

TP4 = Layout(tensor=4)
PP2 = Layout(pipeline=2, options=(("num_layers_in_first_pipeline_stage", 1),))  # of three
EP2 = Layout(expert=2)
TP2_PP2 = dataclasses.replace(PP2, tensor=2)
INTERLEAVED = Layout(pipeline=2, virtual=2)
MTP_ALONE = Layout(pipeline=2, options=(("pipeline_model_parallel_layout", "Ettt|mL"),))


def _with(name: str, what: str, **fields: Any) -> Case:
    """A case with other fields, and a name of its own."""
    found = case(name)
    return dataclasses.replace(found, name=f"{name}, {what}", fields={**found.fields, **fields})


def _for_four(name: str, *, groups: int = 4) -> Case:
    """Sizes that four ranks can share; two query groups lie on two ranks each."""
    sizes = {"num_attention_heads": 4, "num_key_value_heads": groups, "intermediate_size": 20}
    if "linear_num_key_heads" in case(name).fields:
        sizes |= {"linear_num_key_heads": 4, "linear_num_value_heads": 12}
    if "num_experts" in case(name).fields:
        sizes |= {"num_experts": 3, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}
    return _with(name, f"{groups} groups", **sizes)


def _for_two(name: str) -> Case:
    """Experts that two ranks can share."""
    return _with(name, "6 experts", num_experts=6)


TIED_WITH_MTP = dataclasses.replace(case("Qwen3.5, tied"), name="Qwen3.5, tied, MTP", mtp=True)
FOUR_LAYERS = _with(
    "Qwen3.5",
    "4 layers",
    num_hidden_layers=4,
    layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
)

LOADS = [
    (TP4, _for_four("Llama")),
    (TP4, _for_four("Qwen3, tied", groups=2)),
    (TP4, _for_four("Qwen3.5", groups=2)),
    (TP4, _for_four("Qwen3-Next")),
    (PP2, case("Llama, tied")),
    (PP2, case("Qwen3")),
    (PP2, case("Qwen3-MoE, a dense layer")),
    (PP2, case("Qwen3-Next")),
    (PP2, case("Qwen3.5, tied")),
    (PP2, TIED_WITH_MTP),
    (MTP_ALONE, case("Qwen3.5")),
    (INTERLEAVED, FOUR_LAYERS),
    (EP2, _for_two("Qwen3-MoE")),
    (EP2, _for_two("Qwen3-Next")),
    (EP2, _for_two("Qwen3.5-MoE")),
    (EP2, _for_two("Qwen3.5-MoE, one tensor an expert")),
    (Layout(tensor=2, expert=2, expert_tensor=1), _for_two("Qwen3-Next")),
    (Layout(tensor=2, expert=2), _for_two("Qwen3.5-MoE")),
    (TP2_PP2, case("Qwen3.5")),
    (dataclasses.replace(PP2, expert=2), _for_two("Qwen3-Next")),
]


def _id(value: Layout | Case) -> str:
    return value.name.replace(",", "").replace(" ", "-") if isinstance(value, Case) else str(value)


@pytest.mark.parametrize(("layout", "case"), LOADS, ids=_id)
def test_every_byte_reaches_every_rank_and_comes_back(
    ranks: Ranks, families: Families, tmp_path: Path, layout: Layout, case: Case
) -> None:
    hf, imported = families(case)
    paths = (hf, imported, tmp_path / "saved")
    assert ranks(layout.ranks).run(on_ranks, layout, pass_through, *paths, mtp=case.mtp) == [[]] * layout.ranks
    export_checkpoint(tmp_path / "saved", tmp_path / "hf", source=imported)
    assert stored_tensors(tmp_path / "hf") == stored_tensors(hf)


@pytest.mark.parametrize(("layout", "case"), [(PP2, case("Qwen3.5")), (EP2, _for_two("Qwen3-Next"))], ids=_id)
def test_a_model_that_keeps_nothing_in_fp32_loads_and_rounds_what_it_would_keep(
    ranks: Ranks, families: Families, tmp_path: Path, layout: Layout, case: Case
) -> None:
    hf, imported = families(case)
    paths = (hf, imported, tmp_path / "saved")
    assert ranks(2).run(on_ranks, layout, pass_through, *paths, mtp=case.mtp, fp32=STOCK) == [[], []]
    report = export_checkpoint(tmp_path / "saved", tmp_path / "hf", source=imported, allow_rounded=True)
    before, after = stored_tensors(hf), stored_tensors(tmp_path / "hf")
    kept = {name for name in before if name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))}
    assert len(kept) == 4
    assert set(report.rounded) == {name for name in before if before[name] != after[name]} == kept


@pytest.mark.parametrize("name", ["Llama, tied", "Qwen3"])
def test_a_model_of_megatron_cores_own_layers_loads(
    ranks: Ranks, families: Families, tmp_path: Path, name: str
) -> None:
    hf, imported = families(case(name))
    layout = dataclasses.replace(TP2_PP2, options=(*PP2.options, ("sequence_parallel", False)))
    paths = (hf, imported, tmp_path / "saved")
    assert ranks(4).run(on_ranks, layout, _pass_through_their_layers, *paths) == [[]] * 4
    export_checkpoint(tmp_path / "saved", tmp_path / "hf", source=imported)
    assert stored_tensors(tmp_path / "hf") == stored_tensors(hf)


def _pass_through_their_layers(*paths: Path, layout: Layout) -> list[str]:
    def spec(config: TransformerConfig, fp32: Fp32Config, *, vp_stage: int | None) -> TransformerBlockSubmodules:
        return get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")

    with mock.patch.object(provider, "decoder_block_spec", spec):
        # Norms of the local backend lack the `_extra_state` of Transformer Engine's, which raise_all misses.
        return pass_through(*paths, layout=layout, fp32=STOCK, strictness=STRICTNESS[-2:])


@pytest.mark.usefixtures("megatron")
@pytest.mark.skipif(KNOWS_COMMON_STATE, reason="megatron-core 0.19 and newer load with raise_all")
def test_raise_all_of_older_releases_names_the_common_state_of_newer_ones_alone(families: Families) -> None:
    hf, imported = families(case("Qwen3.5"))
    with pytest.raises(CheckpointingException, match=r"^Some keys [^\n]+\nMissing keys [^:]+: \{'common_state'\}\. $"):
        load(build(hf, mtp=True), imported, strict="raise_all")


@pytest.mark.parametrize(
    ("layout", "case"),
    [
        (TP4, _for_four("Qwen3, tied", groups=2)),
        (PP2, TIED_WITH_MTP),
        (EP2, _for_two("Qwen3-Next")),
        (TP2_PP2, case("Llama, tied")),
    ],
    ids=_id,
)
def test_answers_are_those_of_transformers(ranks: Ranks, families: Families, layout: Layout, case: Case) -> None:
    hf, imported = families(case)
    tokens = torch.randint(0, 57, (2, 20), generator=torch.Generator().manual_seed(1))
    found = ranks(layout.ranks).run(on_ranks, layout, logits, hf, imported, tokens, mtp=case.mtp)
    last = [ours for ours in found if ours is not None]
    assert len(last) == layout.ranks // layout.pipeline
    for ours in last:
        assert_parity(ours, case, hf, tokens)
