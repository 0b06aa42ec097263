"""Two Hugging Face checkpoints of one model in two layouts; what differs is computed here from the files.

The layouts are made of what transformers wrote by the helpers of `tests.families`, without the package.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32.checkpoint.compare.layouts import Entry, under_common_names
from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
from megatron_fp32.weights.mapping import TensorMapping, concat_rows, rename, split_rows, zero_centred
from megatron_fp32.weights.model_map import map_model
from megatron_fp32.weights.tensors import TensorInfo
from tests.checkpoint.support import Changes, Tensors, altered, statuses_of, stored_tensors, the_only, without_start
from tests.conftest import Families
from tests.families import case, config_json, unfuse


def _alone(hf: Path, out: Path, *changes: Changes) -> Path:
    """The text model of a vision-language checkpoint."""

    def rename(tensors: Tensors) -> Tensors:
        tensors = without_start("model.visual.")(tensors)
        return {name.replace("model.language_model.", "model."): tensor for name, tensor in tensors.items()}

    config = config_json(hf)
    text = {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"]}
    return altered(hf, out, rename, *changes, config=text)


class TestVisionLanguage:
    @pytest.fixture
    def vl(self, families: Families) -> Path:
        return families(case("Qwen3.5-VL-MoE"))[0]

    @pytest.mark.parametrize("name", ["Qwen3-VL", "Qwen3.5-VL", "Qwen3.5-VL-MoE"])
    def test_its_text_model_equals_one_that_stands_alone(self, families: Families, tmp_path: Path, name: str) -> None:
        hf, _ = families(case(name))
        alone = _alone(hf, tmp_path / "alone")
        vision = {name for name in stored_tensors(hf) if name.startswith("model.visual.")}
        assert vision
        for pair, status in (((hf, alone), "only_a"), ((alone, hf), "only_b")):
            report = verify_checkpoints(*pair)
            assert statuses_of(report) == dict.fromkeys(vision, status)
            assert report.compared == report.equal == len(stored_tensors(alone))
            assert verify_checkpoints(*pair, text_only=True).agrees()

    def test_experts_may_be_separate_besides(self, vl: Path, tmp_path: Path) -> None:
        alone = _alone(vl, tmp_path / "alone", unfuse)
        for pair in ((vl, alone), (alone, vl)):
            report = verify_checkpoints(*pair, text_only=True)
            assert report.agrees(), report.differences
            assert report.compared == len([name for name in stored_tensors(alone) if not name.startswith("mtp.")])

    def test_differences_have_the_names_of_both(self, vl: Path, tmp_path: Path) -> None:
        o_proj, down = "layers.1.self_attn.o_proj.weight", "layers.1.mlp.experts.4.down_proj.weight"

        def change(tensors: Tensors) -> Tensors:
            for end in (o_proj, down):
                tensors[f"model.{end}"][3, 2] += 1
            return tensors

        alone = _alone(vl, tmp_path / "alone", unfuse, change)
        start = "model.language_model."
        stack = f"{start}layers.1.mlp.experts.down_proj[4]"
        report = verify_checkpoints(vl, alone, text_only=True)
        assert {difference.name: difference.note for difference in report.differences} == {
            f"{start}{o_proj}": f"model.{o_proj} in B",
            f"{start}{down}": f"{stack} in A, model.{down} in B",
        }
        report = verify_checkpoints(alone, vl, text_only=True)
        assert {difference.name: difference.note for difference in report.differences} == {
            f"model.{o_proj}": f"{start}{o_proj} in B",
            f"model.{down}": f"{stack} in B",
        }
        for difference in report.differences:
            assert difference.values is not None
            assert difference.values.first == (3, 2)

    def test_what_one_lacks_has_the_name_that_the_other_gives_it(self, vl: Path, tmp_path: Path) -> None:
        alone = _alone(
            vl, tmp_path / "alone", without_start("model.norm."), lambda ts: {**ts, "model.more": torch.ones(2)}
        )
        expected = {"model.language_model.norm.weight": "only_b", "model.more": "only_a"}
        assert statuses_of(verify_checkpoints(alone, vl, text_only=True)) == expected
        flipped = {name: {"only_a": "only_b", "only_b": "only_a"}[status] for name, status in expected.items()}
        assert statuses_of(verify_checkpoints(vl, alone, text_only=True)) == flipped

    def test_what_has_one_name_in_both_keeps_it(self, vl: Path, tmp_path: Path) -> None:
        stored = load_file(vl / "model.safetensors")
        vision = {name: tensor for name, tensor in stored.items() if name.startswith("model.visual.")}
        beside = _alone(vl, tmp_path / "beside", lambda tensors: {**tensors, **vision})
        for pair in ((vl, beside), (beside, vl)):
            assert verify_checkpoints(*pair).agrees()

        alone = _alone(vl, tmp_path / "alone")
        norm = "model.language_model.norm.weight"
        more = altered(vl, tmp_path / "more", lambda tensors: {**tensors, "model.norm.weight": tensors[norm].clone()})
        assert statuses_of(verify_checkpoints(alone, more, text_only=True)) == {norm: "only_b"}
        assert statuses_of(verify_checkpoints(more, alone, text_only=True)) == {norm: "only_a"}

    def test_another_shape_has_the_names_of_both(self, vl: Path, tmp_path: Path) -> None:
        shorter = _alone(
            vl, tmp_path / "alone", lambda ts: {**ts, "model.norm.weight": ts["model.norm.weight"][1:].clone()}
        )
        difference = the_only(verify_checkpoints(shorter, vl, text_only=True))
        assert (difference.name, difference.status) == ("model.norm.weight", "shape")
        assert difference.note == "model.language_model.norm.weight in B"


def test_input_projections_by_key_head_equal_separate_ones(families: Families, tmp_path: Path) -> None:
    """As Qwen3-Next stores them, and as Qwen3.5 does."""
    hf, _ = families(case("Qwen3-Next"))
    config = config_json(hf)
    groups, ratio = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]
    key, value = config["linear_key_head_dim"], ratio * config["linear_value_head_dim"]

    def separate(tensors: Tensors) -> Tensors:
        changed: Tensors = {}
        for name, tensor in tensors.items():
            start, middle, end = name.partition(".in_proj_")
            grouped = tensor.view(groups, -1, tensor.shape[-1]) if middle else tensor
            if end == "qkvz.weight":
                q, k, v, z = (t.reshape(-1, tensor.shape[1]) for t in grouped.split([key, key, value, value], dim=1))
                changed |= {f"{start}.in_proj_qkv.weight": torch.cat([q, k, v]), f"{start}.in_proj_z.weight": z}
            elif end == "ba.weight":
                for kind, part in zip("ba", grouped.split([ratio, ratio], dim=1), strict=True):
                    changed[f"{start}.in_proj_{kind}.weight"] = part.reshape(-1, tensor.shape[1])
            else:
                changed[name] = tensor
        return {name: tensor.contiguous() for name, tensor in changed.items()}

    other = altered(hf, tmp_path / "separate", separate, config={**config, "model_type": "qwen3_5_moe_text"})
    for pair in ((hf, other), (other, hf)):
        report = verify_checkpoints(*pair)
        assert report.agrees(), report.differences
        assert report.compared == len(stored_tensors(other))

    def change(tensors: Tensors) -> Tensors:
        tensors["model.layers.2.linear_attn.in_proj_z.weight"][9, 1] += 1
        return tensors

    # What has one name in both stays whole, whatever config.json says of it.
    config |= {"model_type": "qwen3_5_moe_text"}
    more = altered(
        hf, tmp_path / "more", without_start("lm_head."), lambda ts: {**ts, "more": torch.ones(2)}, config=config
    )
    assert statuses_of(verify_checkpoints(hf, more)) == {"lm_head.weight": "only_a", "more": "only_b"}

    difference = the_only(verify_checkpoints(altered(other, tmp_path / "changed", change), hf))
    assert difference.name == "model.layers.2.linear_attn.in_proj_z.weight"
    assert difference.note == "model.layers.2.linear_attn.in_proj_qkvz.weight in B"
    assert difference.values is not None
    assert (difference.values.count, difference.values.first) == (1, (9, 1))


class TestCommonNames:
    """Mappings that no family has so far."""

    @staticmethod
    def _pair(
        a: Tensors, of_a: Sequence[TensorMapping], b: Tensors, of_b: Sequence[TensorMapping]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        plan = map_model(case("Llama").text_config().to_dict(), ["model.embed_tokens.weight"])
        plans = [dataclasses.replace(plan, mappings=tuple(mappings)) for mappings in (of_a, of_b)]
        first, second = under_common_names(_entries(a), _entries(b), plans)
        return {n: e.read(()) for n, e in first.items()}, {n: e.read(()) for n, e in second.items()}

    def test_a_tensor_of_which_the_other_has_only_a_part_stays_whole(self) -> None:
        a, b = {"x": torch.rand(6, 3)}, {"y": torch.rand(2, 3), "z": torch.rand(3, 3)}
        split = split_rows("x", [("q", 2), ("k", 3), ("v", 1)], (3,))
        pair = self._pair(a, [split], b, [rename("y", "q", (2, 3)), rename("z", "k", (3, 3))])
        assert [entries.keys() for entries in pair] == [a.keys(), b.keys()]

    def test_other_names_alone_are_no_other_layout(self) -> None:
        stacked = [rename(name, "w", (3,)).place(hf=lambda spec: spec.in_stack(0, 1)) for name in "xy"]
        a, b = {"x": torch.rand(1, 3)}, {"y": torch.rand(1, 3)}
        assert [entries.keys() for entries in self._pair(a, stacked[:1], b, stacked[1:])] == [a.keys(), b.keys()]
        several = [concat_rows([(f"{name}1", 2), (f"{name}2", 3)], "w", (3,)) for name in "xy"]
        a, b = ({f"{name}1": torch.rand(2, 3), f"{name}2": torch.rand(3, 3)} for name in "xy")
        assert [entries.keys() for entries in self._pair(a, several[:1], b, several[1:])] == [a.keys(), b.keys()]

    def test_a_change_that_cannot_be_undone_is_not_made(self) -> None:
        a, b = {"x": torch.rand(2, 3)}, {"y": torch.rand(3)}
        stacked = rename("x", "norm", (3,)).place(hf=lambda spec: spec.in_stack(0, 2))
        pair = self._pair(a, [stacked], b, [zero_centred("y", "norm", (3,))])
        assert [entries.keys() for entries in pair] == [a.keys(), b.keys()]

    def test_elements_that_are_left_can_be_read(self) -> None:
        a, b = {"x": torch.rand(2, 3)}, {"y": torch.rand(3)}
        stacked = [rename("x", f"w{i}", (3,)).place(hf=lambda spec, i=i: spec.in_stack(i, 2)) for i in range(2)]
        pair = self._pair(b, [rename("y", "w0", (3,))], a, stacked)
        assert [entries.keys() for entries in pair] == [{"y"}, {"y", "x[1]"}]
        assert torch.equal(pair[1]["y"], a["x"][0])
        assert torch.equal(pair[1]["x[1]"], a["x"][1])


def _entries(tensors: Tensors) -> dict[str, Entry]:
    return {
        name: Entry(
            name=name,
            info=TensorInfo(dtype=tensor.dtype, shape=tuple(tensor.shape)),
            read=lambda index, tensor=tensor: tensor[index],
        )
        for name, tensor in tensors.items()
    }


class TestNamesOnly:
    def test_a_family_that_is_not_known_is_compared_by_name_and_the_report_says_so(
        self, layouts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        fused, separate = layouts
        names = {path: set(stored_tensors(path)) for path in layouts}
        unknown = altered(separate, tmp_path / "unknown", config={"model_type": "gpt2"})
        (bare := altered(separate, tmp_path / "bare")).joinpath("config.json").unlink()
        for other, reason in ((unknown, "names the model_type 'gpt2'"), (bare, "no config.json in")):
            for pair in ((fused, other), (other, fused)):
                report = verify_checkpoints(*pair)
                assert str(other) in report.names_only
                assert reason in report.names_only
                found = {name for name, status in statuses_of(report).items() if status.startswith("only_")}
                assert found == names[fused] ^ names[separate]
                assert report.compared == report.equal == len(names[fused] & names[separate])
                assert report.as_json()["names_only"] == report.names_only

    def test_it_says_nothing_where_no_layout_could_have_been_paired(
        self, layouts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        _, separate = layouts
        (bare := altered(separate, tmp_path / "bare", without_start("lm_head."))).joinpath("config.json").unlink()
        report = verify_checkpoints(separate, bare)
        assert (statuses_of(report), report.names_only) == ({"lm_head.weight": "only_a"}, "")
        assert verify_checkpoints(bare, bare).names_only == ""

    def test_it_says_nothing_where_both_families_are_known(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = layouts
        other = altered(
            separate, tmp_path / "other", without_start("lm_head."), lambda ts: {**ts, "more": torch.ones(2)}
        )
        report = verify_checkpoints(fused, other)
        assert (statuses_of(report), report.names_only) == ({"lm_head.weight": "only_a", "more": "only_b"}, "")
