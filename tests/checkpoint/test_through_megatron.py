"""Checkpoints on their way through megatron-core: import, load, save, export; and the model's answers on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32.checkpoint.convert import export_checkpoint
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.config import Fp32Config
from megatron_fp32.errors import CheckpointError
from megatron_fp32.testing.qwen3_5 import load_qwen3_5
from megatron_fp32.testing.ranks import RankPool
from tests.checkpoint.layouts import Layout, build, load, logits, on_ranks, pass_through, save
from tests.checkpoint.support import A_LOG, NORM, stored_tensors
from tests.conftest import Source
from tests.qwen3_5 import EVEN

_TIED_EVEN = {**EVEN, "tie_word_embeddings": True}


class TestUntrained:
    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
    def test_every_byte_comes_back_from_one_rank(
        self, source: Source, imported: Source, tmp_path: Path, fields: dict[str, Any]
    ) -> None:
        assert pass_through(source(**fields), imported(**fields), tmp_path / "trained") == []
        export_checkpoint(tmp_path / "trained", tmp_path / "hf", source=imported(**fields))
        assert stored_tensors(tmp_path / "hf") == stored_tensors(source(**fields))

    @pytest.mark.parametrize("fields", [EVEN, _TIED_EVEN], ids=["untied", "tied"])
    def test_every_byte_comes_back_from_two_ranks(
        self, ranks: Callable[[int], RankPool], source: Source, imported: Source, tmp_path: Path, fields: dict[str, Any]
    ) -> None:
        paths = (source(**fields), imported(**fields), tmp_path / "trained")
        assert ranks(2).run(on_ranks, Layout(tensor=2), pass_through, *paths) == [[], []]
        saved = TorchDistReader(tmp_path / "trained").tensors["embedding.word_embeddings.weight"]
        assert saved.shape[0] > fields["vocab_size"]  # padded rows lie in the checkpoint
        export_checkpoint(tmp_path / "trained", tmp_path / "hf", source=imported(**fields))
        assert stored_tensors(tmp_path / "hf") == stored_tensors(source(**fields))


class TestRounded:
    @pytest.fixture
    def stock(self, megatron: None, source: Source, imported: Source, tmp_path: Path) -> Path:
        """What megatron-core's own layer leaves of the checkpoint in a bf16 model."""
        pass_through(source(), imported(), tmp_path / "stock", fp32=Fp32Config(gated_delta_net=()))
        return tmp_path / "stock"

    def test_a_stock_models_checkpoint_is_refused_unless_allowed(
        self, stock: Path, source: Source, imported: Source, tmp_path: Path
    ) -> None:
        with pytest.raises(CheckpointError, match=rf"were rounded.*{A_LOG}, {NORM}.*Pass allow_rounded=True"):
            export_checkpoint(stock, tmp_path / "hf", source=imported())
        assert [p.name for p in tmp_path.iterdir()] == ["stock"]

        report = export_checkpoint(stock, tmp_path / "hf", source=imported(), allow_rounded=True)
        assert set(report.rounded) == {A_LOG, NORM}
        before, after = (load_file(path / "model.safetensors") for path in (source(), tmp_path / "hf"))
        assert {name for name in before if not torch.equal(before[name], after[name])} == {A_LOG, NORM}
        assert torch.equal(after[A_LOG], before[A_LOG].bfloat16().float())
        assert after[NORM].dtype == torch.float32
        assert torch.equal(after[NORM], (before[NORM] - 1).bfloat16().float() + 1)
        assert report.unchanged == report.tensors - 2


class TestTrained:
    @pytest.mark.usefixtures("megatron")
    def test_parameters_trained_in_fp32_leave_as_f32_and_are_named(
        self, source: Source, imported: Source, tmp_path: Path
    ) -> None:
        hf, made = source(all_bf16=True), imported(all_bf16=True)
        (model,) = build(hf)
        load([model], made)
        layer = model.decoder.layers[0].self_attention
        with torch.no_grad():
            layer.A_log.add_(1e-4)
        save([model], tmp_path / "trained")
        report = export_checkpoint(tmp_path / "trained", tmp_path / "hf", source=made)
        before, after = (load_file(path / "model.safetensors") for path in (hf, tmp_path / "hf"))
        assert report.widened == (A_LOG,)
        assert after[A_LOG].dtype == torch.float32
        assert torch.equal(after[A_LOG], before[A_LOG].float() + 1e-4)
        assert after[NORM].dtype == torch.bfloat16  # untouched, and exact in the dtype that it came with
        assert {n for n, t in after.items() if not torch.equal(t, before[n])} == {A_LOG}

    @pytest.mark.usefixtures("megatron")
    def test_a_trained_norm_leaves_as_what_the_checkpoint_says(
        self, source: Source, imported: Source, tmp_path: Path
    ) -> None:
        (model,) = build(source())
        load([model], imported())
        weight = model.decoder.layers[0].self_attention.out_norm.weight
        with torch.no_grad():
            weight[0] += 0.25
        save([model], tmp_path / "trained")
        report = export_checkpoint(tmp_path / "trained", tmp_path / "hf", source=imported())
        after = load_file(tmp_path / "hf" / "model.safetensors")
        assert torch.equal(after[NORM], weight.detach() + 1)
        assert (report.widened, report.rounded, report.unchanged) == ((), (), report.tensors - 1)


class TestParity:
    """transformers is the witness; both compute in fp32."""

    @pytest.fixture
    def tokens(self) -> Tensor:
        return torch.randint(0, 57, (2, 19), generator=torch.Generator().manual_seed(1))

    @pytest.mark.usefixtures("megatron")
    @pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True}], ids=["untied", "tied"])
    def test_one_rank(self, source: Source, imported: Source, tokens: Tensor, fields: dict[str, Any]) -> None:
        ours = logits(source(**fields), imported(**fields), tokens)
        _assert_parity(ours, source(**fields), tokens)

    @pytest.mark.parametrize(
        ("size", "fields"),
        [(2, EVEN), (2, _TIED_EVEN), (3, {})],
        ids=["2 ranks, untied, odd vocabulary", "2 ranks, tied, odd vocabulary", "3 ranks"],
    )
    def test_several_ranks(
        self,
        ranks: Callable[[int], RankPool],
        source: Source,
        imported: Source,
        tokens: Tensor,
        size: int,
        fields: dict[str, Any],
    ) -> None:
        layout = Layout(tensor=size, options=(("sequence_parallel", False),))
        for ours in ranks(size).run(on_ranks, layout, logits, source(**fields), imported(**fields), tokens):
            _assert_parity(ours, source(**fields), tokens)


def _assert_parity(ours: Tensor, hf: Path, tokens: Tensor) -> None:
    with torch.no_grad():
        theirs = load_qwen3_5(hf)(tokens).logits
    assert theirs.std() > 2  # small logits would hide a wrong body
    assert (ours.double().log_softmax(-1) - theirs.double().log_softmax(-1)).abs().max() < 1e-5
