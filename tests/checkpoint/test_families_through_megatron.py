"""Every family through megatron-core: keys, bytes after load and save in bf16, and answers beside transformers'."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32.checkpoint.convert import export_checkpoint
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from megatron_fp32.checkpoint.plan import plan_import
from megatron_fp32.models import provider
from megatron_fp32.models.live import LiveTensors
from megatron_fp32.testing.ranks import RankPool
from tests.checkpoint.layouts import ONE_RANK, Layout, build, load, logits, on_ranks, pass_through
from tests.checkpoint.support import assert_parity, stored_tensors
from tests.conftest import Families
from tests.families import CASES, Case, case, config_json, fuse

ONE_OF_EACH = tuple(
    case(name)
    for name in (
        "Llama", "Qwen3, tied", "Qwen3-MoE", "Qwen3-MoE, a dense layer", "Qwen3-VL-MoE, as released", "Qwen3-Next",
        "Qwen3.5-VL-MoE",
    )
)  # fmt: skip
TP2 = Layout(tensor=2)
LENGTH = 18


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 57, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("megatron")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_keys_and_shapes_are_those_of_the_built_model(families: Families, case: Case) -> None:
    hf, _ = families(case)
    with HuggingFaceReader(hf) as reader:
        plan = plan_import(config_json(hf), reader.tensors, vision="carry")
    model = provider.build_model(
        plan.config,
        provider.transformer_config(
            plan.config, **provider.cpu_overrides(), mtp_num_layers=plan.naming.mtp_layers or None
        ),
        vocab_divisible_by=1,
    )
    state = model.sharded_state_dict(metadata=ensure_metadata_has_dp_cp_group({}))
    apply_factories(state)
    entries = list(nested_values(state))
    tensors = {name: info.shape for name, info in LiveTensors(model, group=None).tensors.items()}
    objects = {entry.unique_key for entry in entries if isinstance(entry, ShardedObject)}
    assert plan.naming.mtp_layers == case.mtp
    assert plan.megatron_shapes == tensors
    assert set(plan.extra_states) == objects


class TestUntrained:
    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_every_byte_comes_back_from_one_rank(self, families: Families, tmp_path: Path, case: Case) -> None:
        hf, imported = families(case)
        assert pass_through(hf, imported, tmp_path / "trained", mtp=case.mtp) == []
        export_checkpoint(tmp_path / "trained", tmp_path / "hf", source=imported)
        assert stored_tensors(tmp_path / "hf") == stored_tensors(hf)

    @pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
    def test_every_byte_comes_back_from_two_ranks(
        self, ranks: Callable[[int], RankPool], families: Families, tmp_path: Path, case: Case
    ) -> None:
        hf, imported = families(case)
        paths = (hf, imported, tmp_path / "trained")
        assert ranks(2).run(on_ranks, TP2, pass_through, *paths, mtp=case.mtp) == [[], []]
        export_checkpoint(tmp_path / "trained", tmp_path / "hf", source=imported)
        assert stored_tensors(tmp_path / "hf") == stored_tensors(hf)


class TestParity:
    """transformers is the witness; both compute in fp32."""

    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
    def test_one_rank(self, families: Families, tokens: Tensor, case: Case) -> None:
        hf, imported = families(case)
        assert_parity(logits(hf, imported, tokens), case, hf, tokens)

    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("name", ["Qwen3-MoE", "Qwen3.5-MoE"])
    def test_a_router_that_chooses_one_expert(self, families: Families, tokens: Tensor, name: str) -> None:
        fields = {**case(name).fields, "num_experts_per_tok": 1}
        one = dataclasses.replace(case(name), name=f"{name}, one expert", fields=fields)
        hf, imported = families(one)
        assert_parity(logits(hf, imported, tokens), one, hf, tokens)

    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("factor", [0.75, 0.25, 1.0])
    def test_a_part_of_a_head_that_is_rotated(self, families: Families, tokens: Tensor, factor: float) -> None:
        """9 of 12 values, which are rounded up to pairs; 3; all."""
        rope = {"rope_type": "default", "rope_theta": 26914.64, "partial_rotary_factor": factor}
        fields = {**case("Qwen3-Next").fields, "rope_parameters": rope}
        part = dataclasses.replace(case("Qwen3-Next"), name=f"Qwen3-Next, {factor}", fields=fields)
        hf, imported = families(part)
        assert_parity(logits(hf, imported, tokens), part, hf, tokens)

    @pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda case: case.name)
    def test_two_ranks(self, ranks: Callable[[int], RankPool], families: Families, tokens: Tensor, case: Case) -> None:
        hf, imported = families(case)
        for ours in ranks(2).run(on_ranks, TP2, logits, hf, imported, tokens):
            assert_parity(ours, case, hf, tokens)


def _mtp_hidden(hf: Path, imported: Path, tokens: Tensor, *, layout: Layout = ONE_RANK) -> Tensor:
    """What Megatron's MTP layer makes of every position but the last, whose next token is unknown: [b, s - 1, H]."""
    (model,) = build(hf, layout, mtp=True, dtype=torch.float32)
    load([model], imported)
    caught: list[Tensor] = []
    model.mtp.register_forward_hook(lambda module, args, output: caught.append(output))
    length = tokens.shape[1]
    positions = torch.arange(length).expand_as(tokens)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        model.eval()(tokens, positions, mask, labels=tokens, loss_mask=torch.ones(tokens.shape))
    (output,) = caught
    if layout.tensor > 1:
        output = gather_from_sequence_parallel_region(output)
        # Each rank's part holds the main hidden states, then those of MTP.
        output = torch.cat([part.chunk(2)[1] for part in output.chunk(layout.tensor)])
        return output.transpose(0, 1)[:, :-1]
    return output.chunk(2)[1].transpose(0, 1)[:, :-1]


class TestMultiTokenPrediction:
    """The witness is made of transformers' modules, in the order in which vLLM calls them."""

    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("name", ["Qwen3-Next", "Qwen3.5", "Qwen3.5-MoE, one tensor an expert"])
    def test_one_rank(self, families: Families, tokens: Tensor, name: str) -> None:
        hf, imported = families(case(name))
        _assert_mtp_parity(_mtp_hidden(hf, imported, tokens), name, hf, tokens)

    def test_two_ranks(self, ranks: Callable[[int], RankPool], families: Families, tokens: Tensor) -> None:
        hf, imported = families(case("Qwen3-Next"))
        for ours in ranks(2).run(on_ranks, TP2, _mtp_hidden, hf, imported, tokens):
            _assert_mtp_parity(ours, "Qwen3-Next", hf, tokens)


def _assert_mtp_parity(ours: Tensor, name: str, hf: Path, tokens: Tensor) -> None:
    exact, theirs = (_mtp_witness(case(name), hf, tokens, dtype) for dtype in (torch.float64, torch.float32))
    assert exact.std() > 0.5
    assert (ours - exact).abs().max() < 4 * (theirs - exact).abs().max()


def _mtp_witness(case: Case, hf: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    body = case.load(hf, dtype).model
    module = case.mtp_module().to(dtype)
    stored = {n.removeprefix("mtp."): t for n, t in load_file(hf / "model.safetensors").items() if n.startswith("mtp.")}
    module.load_state_dict(stored if any("gate_up_proj" in n for n in stored) or not _is_moe(stored) else fuse(stored))
    length = tokens.shape[1] - 1
    with torch.no_grad():
        hidden = body(tokens).last_hidden_state[:, :-1]
        rotary = body.rotary_emb(hidden, torch.arange(length).expand(len(tokens), length))
        mask = torch.full((1, 1, length, length), -torch.inf, dtype=dtype).triu(1)
        return module(body.embed_tokens(tokens[:, 1:]), hidden, rotary, mask)


def _is_moe(names: Collection[str]) -> bool:
    return any(".experts." in name for name in names)
