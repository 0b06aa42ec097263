"""Two Hugging Face checkpoints of one model in two layouts; what differs is computed here from the files.

The layouts are made of what transformers wrote by the helpers of `tests.families`, without the package.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32.checkpoint import verify
from megatron_fp32.checkpoint.convert import import_checkpoint
from megatron_fp32.checkpoint.findings import TensorDifference, VerifyReport
from megatron_fp32.checkpoint.huggingface import HuggingFaceReader, TensorInfo
from megatron_fp32.checkpoint.plan import plan_model
from megatron_fp32.checkpoint.verify import verify_checkpoints
from megatron_fp32.checkpoint.verify_layouts import Entry, under_common_names
from megatron_fp32.models.mapping import ConcatRows, Mapping, Rename, SplitRows, ZeroCentred
from tests.checkpoint.conftest import Families
from tests.checkpoint.support import rewrite, stored_tensors
from tests.families import case, config_json, fuse, fuse_all_but_mtp, transpose_experts, unfuse

Tensors = dict[str, Tensor]
Changes = Callable[[Tensors], Tensors]

EXPERTS = "model.layers.1.mlp.experts."


def _copy(hf: Path, out: Path, *changes: Changes, config: dict[str, Any] | None = None) -> Path:
    shutil.copytree(hf, out)
    if config is not None:
        (out / "config.json").write_text(json.dumps(config))
    for change in changes:
        rewrite(out, change)
    return out


def _without(*starts: str) -> Changes:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.startswith(starts)}


def _alone(hf: Path, out: Path, *changes: Changes) -> Path:
    """The text model of a vision-language checkpoint."""

    def rename(tensors: Tensors) -> Tensors:
        tensors = _without("model.visual.")(tensors)
        return {name.replace("model.language_model.", "model."): tensor for name, tensor in tensors.items()}

    config = config_json(hf)
    text = {**config["text_config"], "tie_word_embeddings": config["tie_word_embeddings"]}
    return _copy(hf, out, rename, *changes, config=text)


def _statuses(report: VerifyReport) -> dict[str, str]:
    return {difference.name: difference.status for difference in report.differences}


def _only(report: VerifyReport) -> TensorDifference:
    (difference,) = report.differences
    return difference


def _nbytes(directory: Path) -> int:
    return sum(len(content) for _, _, content in stored_tensors(directory).values())


@pytest.fixture
def both(families: Families, tmp_path: Path) -> tuple[Path, Path]:
    """Fused experts, also of the MTP layer, and the same values with one tensor for each."""
    hf, _ = families(case("Qwen3.5-MoE"))
    return hf, _copy(hf, tmp_path / "separate", unfuse)


class TestExperts:
    @pytest.mark.parametrize(
        "name",
        ["Qwen3-MoE", "Qwen3-MoE, fused", "Qwen3-MoE, a dense layer", "Qwen3-Next", "Qwen3.5-MoE", "Qwen3.5-VL-MoE"],
    )
    def test_fused_ones_equal_separate_ones(self, families: Families, tmp_path: Path, name: str) -> None:
        hf, _ = families(case(name))
        separate = _copy(hf, tmp_path / "separate", unfuse)
        fused = _copy(separate, tmp_path / "fused", fuse)
        assert stored_tensors(fused).keys().isdisjoint(n for n in stored_tensors(separate) if ".experts." in n)
        for pair in ((fused, separate), (separate, fused)):
            steps: list[tuple[str, int, int]] = []
            report = verify_checkpoints(*pair, progress=lambda *step, steps=steps: steps.append(step))
            assert report.agrees(), report.differences
            assert report.compared == report.equal == len(stored_tensors(separate))
            assert report.nbytes == _nbytes(separate) == sum(size for _, size, _ in steps)
            assert {total for _, _, total in steps} == {report.nbytes}
            assert (report.a.tensors, report.b.tensors) == tuple(len(stored_tensors(path)) for path in pair)

    @pytest.mark.parametrize("width", [14, 18], ids=["H != 2F", "H = 2F"])
    @pytest.mark.parametrize("whole", [True, False], ids=["whole", "one expert at a time"])
    def test_transposed_ones_equal_others(
        self, families: Families, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, whole: bool
    ) -> None:
        found = case("Qwen3-VL-MoE")
        fields = {**found.fields, "moe_intermediate_size": width}
        hf, _ = families(dataclasses.replace(found, name=f"Qwen3-VL-MoE, {width}", fields=fields))
        released = _copy(hf, tmp_path / "released", transpose_experts)
        monkeypatch.setattr(verify, "_WHOLE_BYTES", 1 << 28 if whole else 0)
        for pair in ((hf, released), (released, hf)):
            report = verify_checkpoints(*pair)
            assert report.agrees(), report.differences
            assert report.equal == len(stored_tensors(hf))

        def change(tensors: Tensors) -> Tensors:
            tensors["model.language_model.layers.1.mlp.experts.gate_up_proj"][3, 5, 7] += 100
            return tensors

        difference = _only(verify_checkpoints(_copy(hf, tmp_path / "changed", change), released))
        assert difference.name == "model.language_model.layers.1.mlp.experts.gate_up_proj"
        assert difference.values is not None
        assert (difference.values.count, difference.values.first) == (1, (3, 5, 7))

    def test_the_mtp_layer_may_differ_from_the_decoder(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both

        def fuse_mtp(tensors: Tensors) -> Tensors:
            mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
            return {**_without("mtp.")(tensors), **fuse(mtp)}

        mixed = _copy(separate, tmp_path / "mixed", fuse_all_but_mtp)
        other = _copy(separate, tmp_path / "other", fuse_mtp)
        for pair in ((fused, mixed), (mixed, separate), (mixed, other), (other, mixed), (other, fused)):
            report = verify_checkpoints(*pair)
            assert report.agrees(), report.differences

    def test_one_flipped_bit_is_found_in_each_tensor(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both

        def flip(tensors: Tensors) -> Tensors:
            for at, tensor in enumerate(tensors.values()):
                bits = tensor.view(-1).view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])
                bits[at * 7919 % len(bits)] ^= 1
            return tensors

        flipped = _copy(separate, tmp_path / "flipped", flip)
        _assert_differences(verify_checkpoints(fused, flipped), separate, flipped, fused_side="A")
        _assert_differences(verify_checkpoints(flipped, fused), flipped, separate, fused_side="B")
        again = _copy(flipped, tmp_path / "again", fuse)
        _assert_differences(verify_checkpoints(separate, again), separate, flipped, fused_side="B")

    def test_one_value_of_one_expert_is_located(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both
        before = load_file(fused / "model.safetensors")[f"{EXPERTS}gate_up_proj"]

        def change(tensors: Tensors) -> Tensors:
            # The up half of expert 3: its row 2 is row 14 + 2 of the fused tensor.
            tensors[f"{EXPERTS}gate_up_proj"][3, 16, 5] += 0.5
            return tensors

        report = verify_checkpoints(_copy(fused, tmp_path / "changed", change), separate)
        difference = _only(report)
        assert (difference.name, difference.status) == (f"{EXPERTS}3.up_proj.weight", "values")
        assert difference.note == f"{EXPERTS}gate_up_proj[3] in A"
        assert difference.values is not None
        assert difference.values.absolute is not None
        largest = difference.values.absolute
        assert (difference.values.count, difference.values.total, largest.index) == (1, 14 * 36, (2, 5))
        old = before[3, 16, 5]
        assert (largest.a, largest.b) == (float(old + 0.5), float(old))
        assert largest.size == abs(float(old + 0.5) - float(old))
        assert report.equal == report.compared - 1

    def test_missing_experts_are_named_and_the_others_compared(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both
        lacking = _copy(separate, tmp_path / "lacking", _without(f"{EXPERTS}3.", f"{EXPERTS}1.up_proj"))
        lost = stored_tensors(separate).keys() - stored_tensors(lacking).keys()
        assert len(lost) == 4
        for pair, status in (((fused, lacking), "only_a"), ((lacking, fused), "only_b")):
            report = verify_checkpoints(*pair)
            assert _statuses(report) == dict.fromkeys(lost, status)
            assert report.compared == report.equal == len(stored_tensors(lacking))
            notes = {difference.name: difference.note for difference in report.differences}
            assert notes[f"{EXPERTS}1.up_proj.weight"] == f"in {EXPERTS}gate_up_proj[1]"
            assert notes[f"{EXPERTS}3.down_proj.weight"] == f"in {EXPERTS}down_proj[3]"
            info = report.differences[0].a or report.differences[0].b
            assert info is not None
            assert (info.dtype, info.shape) == (
                torch.bfloat16,
                (36, 14) if ".down" in report.differences[0].name else (14, 36),
            )

    def test_a_missing_stack_is_named(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both
        lacking = _copy(fused, tmp_path / "lacking", _without(f"{EXPERTS}down_proj"))
        lost = {name for name in stored_tensors(separate) if name.startswith(EXPERTS) and ".down_proj" in name}
        assert _statuses(verify_checkpoints(separate, lacking)) == dict.fromkeys(lost, "only_a")
        assert _statuses(verify_checkpoints(lacking, separate)) == dict.fromkeys(lost, "only_b")

    def test_experts_of_a_larger_model_are_in_one_only(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both
        config = {**config_json(separate), "num_experts": 4}

        def drop(tensors: Tensors) -> Tensors:
            return {name: tensor for name, tensor in tensors.items() if ".experts.4." not in name}

        four = _copy(separate, tmp_path / "four", drop, config=config)
        starts = [*(f"model.layers.{layer}.mlp.experts." for layer in range(3)), "mtp.layers.0.mlp.experts."]
        lost = {f"{start}{kind}[4]" for start in starts for kind in ("gate_up_proj", "down_proj")}
        for pair, status in (((fused, four), "only_a"), ((four, fused), "only_b")):
            report = verify_checkpoints(*pair)
            assert _statuses(report) == dict.fromkeys(lost, status)
            assert report.compared == report.equal == len(stored_tensors(four))

    def test_another_dtype_is_told_from_other_values(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both
        name = f"{EXPERTS}2.gate_proj.weight"

        def widen(tensors: Tensors) -> Tensors:
            return {**tensors, name: tensors[name].float()}

        def change(tensors: Tensors) -> Tensors:
            tensors[name][1, 1] += 2**-20
            return tensors

        wide = _copy(separate, tmp_path / "wide", widen)
        report = verify_checkpoints(fused, wide)
        difference = _only(report)
        assert (difference.name, difference.status) == (name, "dtype")
        assert difference.a is not None
        assert difference.b is not None
        assert (difference.a.dtype, difference.b.dtype) == (torch.bfloat16, torch.float32)
        assert (report.agrees(), report.agrees(values_only=True)) == (False, True)
        difference = _only(verify_checkpoints(_copy(wide, tmp_path / "changed", change), fused))
        assert difference.status == "values"
        assert difference.values is not None
        assert (difference.values.count, difference.values.first) == (1, (1, 1))

    def test_other_shapes_are_named(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both
        name = f"{EXPERTS}2.gate_proj.weight"
        shorter = _copy(separate, tmp_path / "shorter", lambda ts: {**ts, name: ts[name][1:].clone()})
        difference = _only(verify_checkpoints(fused, shorter))
        assert (difference.name, difference.status) == (name, "shape")
        assert difference.a is not None
        assert difference.b is not None
        assert (difference.a.shape, difference.b.shape) == ((14, 36), (13, 36))
        # What cannot be taken apart stays whole.
        stack = f"{EXPERTS}gate_up_proj"
        odd = _copy(fused, tmp_path / "odd", lambda ts: {**ts, stack: ts[stack][:, 1:].clone()})
        statuses = _statuses(verify_checkpoints(odd, separate))
        halves = [n for n in stored_tensors(separate) if n.startswith(EXPERTS) and ".down_proj" not in n]
        assert statuses == {stack: "only_a", **dict.fromkeys(halves, "only_b")}

    def test_the_other_layers_are_paired_where_one_is_dense(self, families: Families, tmp_path: Path) -> None:
        hf, _ = families(case("Qwen3-MoE, fused"))
        dense = "model.layers.1.mlp."
        config = {**config_json(hf), "mlp_only_layers": [1]}
        other = _copy(hf, tmp_path / "other", unfuse, _without(dense), config=config)
        lost = {name for name in stored_tensors(hf) if name.startswith(dense)}
        assert len(lost) == 3
        assert _statuses(verify_checkpoints(hf, other)) == dict.fromkeys(lost, "only_a")

    def test_experts_of_another_size_are_in_one_only(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both

        def halve(tensors: Tensors) -> Tensors:
            cut = {"gate": lambda t: t[:7], "up_p": lambda t: t[:7], "down": lambda t: t[:, :7]}
            return {
                name: cut[name.split(".")[-2][:4]](tensor).clone() if ".experts." in name else tensor
                for name, tensor in tensors.items()
            }

        narrow = _copy(
            separate, tmp_path / "narrow", halve, config={**config_json(separate), "moe_intermediate_size": 7}
        )
        statuses = _statuses(verify_checkpoints(fused, narrow))
        assert {n for n, status in statuses.items() if status == "only_a"} == {
            name for name in stored_tensors(fused) if ".experts." in name
        }
        assert {n for n, status in statuses.items() if status == "only_b"} == {
            name for name in stored_tensors(separate) if ".experts." in name
        }

    def test_a_checkpoint_with_both_layouts_keeps_all_of_its_tensors(
        self, both: tuple[Path, Path], tmp_path: Path
    ) -> None:
        fused, separate = both
        start = "model.layers.0.mlp.experts."
        first = {name: t + 1 for name, t in load_file(fused / "model.safetensors").items() if name.startswith(start)}
        more = _copy(separate, tmp_path / "both", lambda tensors: {**tensors, **first})
        other = _copy(separate, tmp_path / "other", lambda tensors: {**tensors, "more": torch.ones(2)})
        statuses = _statuses(verify_checkpoints(more, other))
        assert statuses == {**dict.fromkeys(first, "only_a"), "more": "only_b"}

    @pytest.mark.parametrize("is_fused_first", [True, False])
    def test_no_more_than_one_is_read_at_a_time(
        self, both: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, is_fused_first: bool
    ) -> None:
        sizes: list[int] = []
        read = HuggingFaceReader.read

        def measured(self: HuggingFaceReader, name: str, *args: Any) -> Tensor:
            tensor = read(self, name, *args)
            if ".experts." in name:
                sizes.append(tensor.numel())
            return tensor

        monkeypatch.setattr(HuggingFaceReader, "read", measured)
        verify_checkpoints(*(both if is_fused_first else both[::-1]))
        assert max(sizes) == 2 * 14 * 36  # gate and up of one of the five

    def test_imports_of_both_are_equal(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        for path in both:
            import_checkpoint(path, tmp_path / f"{path.name}-megatron")
        imports = [tmp_path / f"{path.name}-megatron" for path in both]
        assert verify_checkpoints(*imports).agrees()
        for hf in both:
            for megatron in imports:
                assert verify_checkpoints(hf, megatron).agrees()


def _assert_differences(report: VerifyReport, a: Path, b: Path, *, fused_side: str) -> None:
    """The report says what float64 says of two checkpoints with separate experts, and where the fused one has them."""
    before, after = (load_file(path / "model.safetensors") for path in (a, b))
    assert {difference.name for difference in report.differences} == before.keys()
    for difference in report.differences:
        x, y = before[difference.name].double(), after[difference.name].double()
        values = difference.values
        assert difference.status == "values"
        assert values is not None
        assert values.absolute is not None
        assert (values.count, values.absolute.size) == (1, float((x - y).abs().max()))
        at = tuple(int(i) for i in (x != y).nonzero()[0])
        assert values.first == values.absolute.index == at
        assert (values.absolute.a, values.absolute.b) == (float(x[at]), float(y[at]))
        start, middle, end = difference.name.partition(".experts.")
        if middle:
            expert, kind = end.removesuffix(".weight").split(".")
            stack = "down_proj" if kind == "down_proj" else "gate_up_proj"
            assert difference.note == f"{start}{middle}{stack}[{expert}] in {fused_side}"
        else:
            assert difference.note == ""
    assert (report.compared, report.equal) == (len(before), 0)


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
            assert _statuses(report) == dict.fromkeys(vision, status)
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
        alone = _alone(vl, tmp_path / "alone", _without("model.norm."), lambda ts: {**ts, "model.more": torch.ones(2)})
        expected = {"model.language_model.norm.weight": "only_b", "model.more": "only_a"}
        assert _statuses(verify_checkpoints(alone, vl, text_only=True)) == expected
        flipped = {name: {"only_a": "only_b", "only_b": "only_a"}[status] for name, status in expected.items()}
        assert _statuses(verify_checkpoints(vl, alone, text_only=True)) == flipped

    def test_what_has_one_name_in_both_keeps_it(self, vl: Path, tmp_path: Path) -> None:
        stored = load_file(vl / "model.safetensors")
        vision = {name: tensor for name, tensor in stored.items() if name.startswith("model.visual.")}
        beside = _alone(vl, tmp_path / "beside", lambda tensors: {**tensors, **vision})
        for pair in ((vl, beside), (beside, vl)):
            assert verify_checkpoints(*pair).agrees()

        alone = _alone(vl, tmp_path / "alone")
        norm = "model.language_model.norm.weight"
        more = _copy(vl, tmp_path / "more", lambda tensors: {**tensors, "model.norm.weight": tensors[norm].clone()})
        assert _statuses(verify_checkpoints(alone, more, text_only=True)) == {norm: "only_b"}
        assert _statuses(verify_checkpoints(more, alone, text_only=True)) == {norm: "only_a"}

    def test_another_shape_has_the_names_of_both(self, vl: Path, tmp_path: Path) -> None:
        shorter = _alone(
            vl, tmp_path / "alone", lambda ts: {**ts, "model.norm.weight": ts["model.norm.weight"][1:].clone()}
        )
        difference = _only(verify_checkpoints(shorter, vl, text_only=True))
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

    other = _copy(hf, tmp_path / "separate", separate, config={**config, "model_type": "qwen3_5_moe_text"})
    for pair in ((hf, other), (other, hf)):
        report = verify_checkpoints(*pair)
        assert report.agrees(), report.differences
        assert report.compared == len(stored_tensors(other))

    def change(tensors: Tensors) -> Tensors:
        tensors["model.layers.2.linear_attn.in_proj_z.weight"][9, 1] += 1
        return tensors

    # What has one name in both stays whole, whatever config.json says of it.
    config |= {"model_type": "qwen3_5_moe_text"}
    more = _copy(hf, tmp_path / "more", _without("lm_head."), lambda ts: {**ts, "more": torch.ones(2)}, config=config)
    assert _statuses(verify_checkpoints(hf, more)) == {"lm_head.weight": "only_a", "more": "only_b"}

    difference = _only(verify_checkpoints(_copy(other, tmp_path / "changed", change), hf))
    assert difference.name == "model.layers.2.linear_attn.in_proj_z.weight"
    assert difference.note == "model.layers.2.linear_attn.in_proj_qkvz.weight in B"
    assert difference.values is not None
    assert (difference.values.count, difference.values.first) == (1, (9, 1))


class TestCommonNames:
    """Mappings that no family has so far."""

    @staticmethod
    def _pair(
        a: Tensors, of_a: Sequence[Mapping], b: Tensors, of_b: Sequence[Mapping]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        plan = plan_model(case("Llama").text_config().to_dict(), ["model.embed_tokens.weight"])
        plans = [dataclasses.replace(plan, mappings=tuple(mappings)) for mappings in (of_a, of_b)]
        first, second = under_common_names(_entries(a), _entries(b), plans)
        return {n: e.read(()) for n, e in first.items()}, {n: e.read(()) for n, e in second.items()}

    def test_a_tensor_of_which_the_other_has_only_a_part_stays_whole(self) -> None:
        a, b = {"x": torch.rand(6, 3)}, {"y": torch.rand(2, 3), "z": torch.rand(3, 3)}
        split = SplitRows("x", [("q", 2), ("k", 3), ("v", 1)], (3,))
        pair = self._pair(a, [split], b, [Rename("y", "q", (2, 3)), Rename("z", "k", (3, 3))])
        assert [entries.keys() for entries in pair] == [a.keys(), b.keys()]

    def test_other_names_alone_are_no_other_layout(self) -> None:
        stacked = [Rename(name, "w", (3,)).place(hf=lambda spec: spec.in_stack(0, 1)) for name in "xy"]
        a, b = {"x": torch.rand(1, 3)}, {"y": torch.rand(1, 3)}
        assert [entries.keys() for entries in self._pair(a, stacked[:1], b, stacked[1:])] == [a.keys(), b.keys()]
        several = [ConcatRows([(f"{name}1", 2), (f"{name}2", 3)], "w", (3,)) for name in "xy"]
        a, b = ({f"{name}1": torch.rand(2, 3), f"{name}2": torch.rand(3, 3)} for name in "xy")
        assert [entries.keys() for entries in self._pair(a, several[:1], b, several[1:])] == [a.keys(), b.keys()]

    def test_a_change_that_cannot_be_undone_is_not_made(self) -> None:
        a, b = {"x": torch.rand(2, 3)}, {"y": torch.rand(3)}
        stacked = Rename("x", "norm", (3,)).place(hf=lambda spec: spec.in_stack(0, 2))
        pair = self._pair(a, [stacked], b, [ZeroCentred("y", "norm", (3,))])
        assert [entries.keys() for entries in pair] == [a.keys(), b.keys()]

    def test_elements_that_are_left_can_be_read(self) -> None:
        a, b = {"x": torch.rand(2, 3)}, {"y": torch.rand(3)}
        stacked = [Rename("x", f"w{i}", (3,)).place(hf=lambda spec, i=i: spec.in_stack(i, 2)) for i in range(2)]
        pair = self._pair(b, [Rename("y", "w0", (3,))], a, stacked)
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
        self, both: tuple[Path, Path], tmp_path: Path
    ) -> None:
        fused, separate = both
        names = {path: set(stored_tensors(path)) for path in both}
        unknown = _copy(separate, tmp_path / "unknown", config={"model_type": "gpt2"})
        (bare := _copy(separate, tmp_path / "bare")).joinpath("config.json").unlink()
        for other, reason in ((unknown, "got 'gpt2'"), (bare, "config.json is missing")):
            for pair in ((fused, other), (other, fused)):
                report = verify_checkpoints(*pair)
                assert str(other) in report.names_only
                assert reason in report.names_only
                found = {name for name, status in _statuses(report).items() if status.startswith("only_")}
                assert found == names[fused] ^ names[separate]
                assert report.compared == report.equal == len(names[fused] & names[separate])
                assert report.as_json()["names_only"] == report.names_only

    def test_it_says_nothing_where_no_layout_could_have_been_paired(
        self, both: tuple[Path, Path], tmp_path: Path
    ) -> None:
        _, separate = both
        (bare := _copy(separate, tmp_path / "bare", _without("lm_head."))).joinpath("config.json").unlink()
        report = verify_checkpoints(separate, bare)
        assert (_statuses(report), report.names_only) == ({"lm_head.weight": "only_a"}, "")
        assert verify_checkpoints(bare, bare).names_only == ""

    def test_it_says_nothing_where_both_families_are_known(self, both: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = both
        other = _copy(separate, tmp_path / "other", _without("lm_head."), lambda ts: {**ts, "more": torch.ones(2)})
        report = verify_checkpoints(fused, other)
        assert (_statuses(report), report.names_only) == ({"lm_head.weight": "only_a", "more": "only_b"}, "")
