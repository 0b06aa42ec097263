"""Fused, separate and transposed experts compared; what differs is computed here from the files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fp32.checkpoint.compare import verify
from megatron_fp32.checkpoint.compare.findings import VerifyReport
from megatron_fp32.checkpoint.compare.verify import verify_checkpoints
from megatron_fp32.checkpoint.convert import import_checkpoint
from megatron_fp32.checkpoint.formats.huggingface import HuggingFaceReader
from tests.checkpoint.support import Tensors, altered, statuses_of, stored_tensors, the_only, without_start
from tests.conftest import Families
from tests.families import case, config_json, fuse, fuse_all_but_mtp, transpose_experts, unfuse

EXPERTS = "model.layers.1.mlp.experts."


def _nbytes(directory: Path) -> int:
    return sum(len(content) for _, _, content in stored_tensors(directory).values())


class TestExperts:
    @pytest.mark.parametrize(
        "name",
        ["Qwen3-MoE", "Qwen3-MoE, fused", "Qwen3-MoE, a dense layer", "Qwen3-Next", "Qwen3.5-MoE", "Qwen3.5-VL-MoE"],
    )
    def test_fused_ones_equal_separate_ones(self, families: Families, tmp_path: Path, name: str) -> None:
        hf, _ = families(case(name))
        separate = altered(hf, tmp_path / "separate", unfuse)
        fused = altered(separate, tmp_path / "fused", fuse)
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
        released = altered(hf, tmp_path / "released", transpose_experts)
        monkeypatch.setattr(verify, "_WHOLE_BYTES", 1 << 28 if whole else 0)
        for pair in ((hf, released), (released, hf)):
            report = verify_checkpoints(*pair)
            assert report.agrees(), report.differences
            assert report.equal == len(stored_tensors(hf))

        def change(tensors: Tensors) -> Tensors:
            tensors["model.language_model.layers.1.mlp.experts.gate_up_proj"][3, 5, 7] += 100
            return tensors

        difference = the_only(verify_checkpoints(altered(hf, tmp_path / "changed", change), released))
        assert difference.name == "model.language_model.layers.1.mlp.experts.gate_up_proj"
        assert difference.values is not None
        assert (difference.values.count, difference.values.first) == (1, (3, 5, 7))

    def test_the_mtp_layer_may_differ_from_the_decoder(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = layouts

        def fuse_mtp(tensors: Tensors) -> Tensors:
            mtp = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
            return {**without_start("mtp.")(tensors), **fuse(mtp)}

        mixed = altered(separate, tmp_path / "mixed", fuse_all_but_mtp)
        other = altered(separate, tmp_path / "other", fuse_mtp)
        for pair in ((fused, mixed), (mixed, separate), (mixed, other), (other, mixed), (other, fused)):
            report = verify_checkpoints(*pair)
            assert report.agrees(), report.differences

    def test_one_flipped_bit_is_found_in_each_tensor(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = layouts

        def flip(tensors: Tensors) -> Tensors:
            for at, tensor in enumerate(tensors.values()):
                bits = tensor.view(-1).view({2: torch.int16, 4: torch.int32}[tensor.dtype.itemsize])
                bits[at * 7919 % len(bits)] ^= 1
            return tensors

        flipped = altered(separate, tmp_path / "flipped", flip)
        _assert_differences(verify_checkpoints(fused, flipped), separate, flipped, fused_side="A")
        _assert_differences(verify_checkpoints(flipped, fused), flipped, separate, fused_side="B")
        again = altered(flipped, tmp_path / "again", fuse)
        _assert_differences(verify_checkpoints(separate, again), separate, flipped, fused_side="B")

    def test_one_value_of_one_expert_is_located(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = layouts
        before = load_file(fused / "model.safetensors")[f"{EXPERTS}gate_up_proj"]

        def change(tensors: Tensors) -> Tensors:
            # The up half of expert 3: its row 2 is row 14 + 2 of the fused tensor.
            tensors[f"{EXPERTS}gate_up_proj"][3, 16, 5] += 0.5
            return tensors

        report = verify_checkpoints(altered(fused, tmp_path / "changed", change), separate)
        difference = the_only(report)
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

    def test_missing_experts_are_named_and_the_others_compared(
        self, layouts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        fused, separate = layouts
        lacking = altered(separate, tmp_path / "lacking", without_start(f"{EXPERTS}3.", f"{EXPERTS}1.up_proj"))
        lost = stored_tensors(separate).keys() - stored_tensors(lacking).keys()
        assert len(lost) == 4
        for pair, status in (((fused, lacking), "only_a"), ((lacking, fused), "only_b")):
            report = verify_checkpoints(*pair)
            assert statuses_of(report) == dict.fromkeys(lost, status)
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

    def test_a_missing_stack_is_named(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = layouts
        lacking = altered(fused, tmp_path / "lacking", without_start(f"{EXPERTS}down_proj"))
        lost = {name for name in stored_tensors(separate) if name.startswith(EXPERTS) and ".down_proj" in name}
        assert statuses_of(verify_checkpoints(separate, lacking)) == dict.fromkeys(lost, "only_a")
        assert statuses_of(verify_checkpoints(lacking, separate)) == dict.fromkeys(lost, "only_b")

    def test_experts_of_a_larger_model_are_in_one_only(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = layouts
        config = {**config_json(separate), "num_experts": 4}

        def drop(tensors: Tensors) -> Tensors:
            return {name: tensor for name, tensor in tensors.items() if ".experts.4." not in name}

        four = altered(separate, tmp_path / "four", drop, config=config)
        starts = [*(f"model.layers.{layer}.mlp.experts." for layer in range(3)), "mtp.layers.0.mlp.experts."]
        lost = {f"{start}{kind}[4]" for start in starts for kind in ("gate_up_proj", "down_proj")}
        for pair, status in (((fused, four), "only_a"), ((four, fused), "only_b")):
            report = verify_checkpoints(*pair)
            assert statuses_of(report) == dict.fromkeys(lost, status)
            assert report.compared == report.equal == len(stored_tensors(four))

    def test_another_dtype_is_told_from_other_values(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = layouts
        name = f"{EXPERTS}2.gate_proj.weight"

        def widen(tensors: Tensors) -> Tensors:
            return {**tensors, name: tensors[name].float()}

        def change(tensors: Tensors) -> Tensors:
            tensors[name][1, 1] += 2**-20
            return tensors

        wide = altered(separate, tmp_path / "wide", widen)
        report = verify_checkpoints(fused, wide)
        difference = the_only(report)
        assert (difference.name, difference.status) == (name, "dtype")
        assert difference.a is not None
        assert difference.b is not None
        assert (difference.a.dtype, difference.b.dtype) == (torch.bfloat16, torch.float32)
        assert (report.agrees(), report.agrees(values_only=True)) == (False, True)
        difference = the_only(verify_checkpoints(altered(wide, tmp_path / "changed", change), fused))
        assert difference.status == "values"
        assert difference.values is not None
        assert (difference.values.count, difference.values.first) == (1, (1, 1))

    def test_other_shapes_are_named(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = layouts
        name = f"{EXPERTS}2.gate_proj.weight"
        shorter = altered(separate, tmp_path / "shorter", lambda ts: {**ts, name: ts[name][1:].clone()})
        difference = the_only(verify_checkpoints(fused, shorter))
        assert (difference.name, difference.status) == (name, "shape")
        assert difference.a is not None
        assert difference.b is not None
        assert (difference.a.shape, difference.b.shape) == ((14, 36), (13, 36))
        # What cannot be taken apart stays whole.
        stack = f"{EXPERTS}gate_up_proj"
        odd = altered(fused, tmp_path / "odd", lambda ts: {**ts, stack: ts[stack][:, 1:].clone()})
        statuses = statuses_of(verify_checkpoints(odd, separate))
        halves = [n for n in stored_tensors(separate) if n.startswith(EXPERTS) and ".down_proj" not in n]
        assert statuses == {stack: "only_a", **dict.fromkeys(halves, "only_b")}

    def test_the_other_layers_are_paired_where_one_is_dense(self, families: Families, tmp_path: Path) -> None:
        hf, _ = families(case("Qwen3-MoE, fused"))
        dense = "model.layers.1.mlp."
        config = {**config_json(hf), "mlp_only_layers": [1]}
        other = altered(hf, tmp_path / "other", unfuse, without_start(dense), config=config)
        lost = {name for name in stored_tensors(hf) if name.startswith(dense)}
        assert len(lost) == 3
        assert statuses_of(verify_checkpoints(hf, other)) == dict.fromkeys(lost, "only_a")

    def test_experts_of_another_size_are_in_one_only(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        fused, separate = layouts

        def halve(tensors: Tensors) -> Tensors:
            cut = {"gate": lambda t: t[:7], "up_p": lambda t: t[:7], "down": lambda t: t[:, :7]}
            return {
                name: cut[name.split(".")[-2][:4]](tensor).clone() if ".experts." in name else tensor
                for name, tensor in tensors.items()
            }

        narrow = altered(
            separate, tmp_path / "narrow", halve, config={**config_json(separate), "moe_intermediate_size": 7}
        )
        statuses = statuses_of(verify_checkpoints(fused, narrow))
        assert {n for n, status in statuses.items() if status == "only_a"} == {
            name for name in stored_tensors(fused) if ".experts." in name
        }
        assert {n for n, status in statuses.items() if status == "only_b"} == {
            name for name in stored_tensors(separate) if ".experts." in name
        }

    def test_a_checkpoint_with_both_layouts_keeps_all_of_its_tensors(
        self, layouts: tuple[Path, Path], tmp_path: Path
    ) -> None:
        fused, separate = layouts
        start = "model.layers.0.mlp.experts."
        first = {name: t + 1 for name, t in load_file(fused / "model.safetensors").items() if name.startswith(start)}
        more = altered(separate, tmp_path / "both", lambda tensors: {**tensors, **first})
        other = altered(separate, tmp_path / "other", lambda tensors: {**tensors, "more": torch.ones(2)})
        statuses = statuses_of(verify_checkpoints(more, other))
        assert statuses == {**dict.fromkeys(first, "only_a"), "more": "only_b"}

    @pytest.mark.parametrize("is_fused_first", [True, False])
    def test_no_more_than_one_is_read_at_a_time(
        self, layouts: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, is_fused_first: bool
    ) -> None:
        sizes: list[int] = []
        read = HuggingFaceReader.read

        def measured(self: HuggingFaceReader, name: str, *args: Any) -> Tensor:
            tensor = read(self, name, *args)
            if ".experts." in name:
                sizes.append(tensor.numel())
            return tensor

        monkeypatch.setattr(HuggingFaceReader, "read", measured)
        verify_checkpoints(*(layouts if is_fused_first else layouts[::-1]))
        assert max(sizes) == 2 * 14 * 36  # gate and up of one of the five

    def test_imports_of_both_are_equal(self, layouts: tuple[Path, Path], tmp_path: Path) -> None:
        for path in layouts:
            import_checkpoint(path, tmp_path / f"{path.name}-megatron")
        imports = [tmp_path / f"{path.name}-megatron" for path in layouts]
        assert verify_checkpoints(*imports).agrees()
        for hf in layouts:
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
