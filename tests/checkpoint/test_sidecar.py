from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.formats.digests import digest
from megatron_fp32.checkpoint.sidecar import find_sidecar
from megatron_fp32.errors import CheckpointError
from megatron_fp32.weights.restore import is_exact_in
from tests.checkpoint.support import stored_tensors
from tests.conftest import Source
from tests.families import case


def _f32(*patterns: int) -> Tensor:
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


_ZERO, _MINUS_ZERO, _NAN, _OTHER_NAN = 0x0, 0x80000000, 0x7FC00000, 0x7FC00001


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int32)),
        (torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.bfloat16)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(1), torch.zeros(())),
        (torch.zeros(0, 2), torch.zeros(2, 0)),
        (_f32(_ZERO), _f32(_MINUS_ZERO)),
        (_f32(_NAN), _f32(_OTHER_NAN)),
        (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])),
    ],
    ids=["dtype", "16-bit dtype", "shape", "0-dim", "empty", "sign of zero", "NaN payload", "order"],
)
def test_a_digest_tells_apart(a: Tensor, b: Tensor) -> None:
    assert digest(a) != digest(b)


def test_equal_bytes_have_one_digest_wherever_they_lie() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    assert digest(base.t()) == digest(base.t().contiguous())
    assert digest(_f32(_OTHER_NAN)) == digest(_f32(_OTHER_NAN))


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (_f32(0x3F800000, 0x3F810000), True),  # 1 and the bf16 after it
        (_f32(0x3F800001), False),  # the fp32 after 1
        (_f32(_ZERO, _MINUS_ZERO), True),
        (_f32(0x7F800000, 0xFF800000), True),  # infinities
        (_f32(0x7F7FFFFF), False),  # the largest fp32 would become infinity
        (_f32(_OTHER_NAN), False),  # its payload would be lost
        (_f32(0x00010000), True),  # the smallest bf16 subnormal
        (_f32(0x00000001), False),  # the smallest fp32 subnormal
        (_f32(0x3F800000, 0x3F800001, 0x3F800000), False),  # one is enough
        (_f32(), True),
    ],
)
def test_fits_in_bf16_exactly_when_no_bit_is_lost(tensor: Tensor, expected: bool) -> None:
    assert is_exact_in(tensor, torch.bfloat16) is expected


def test_fits_in_fp16_needs_range_too() -> None:
    assert is_exact_in(torch.tensor([65504.0, 2.0**-24]), torch.float16)
    assert not is_exact_in(torch.tensor([65520.0]), torch.float16)
    assert not is_exact_in(torch.tensor([2.0**-25]), torch.float16)


def test_a_strided_tensor_is_judged_by_its_values() -> None:
    values = torch.stack([torch.ones(3), _f32(0x3F800001, 0x3F800001, 0x3F800001)], dim=1)
    assert is_exact_in(values[:, 0], torch.bfloat16)
    assert not is_exact_in(values[:, 1], torch.bfloat16)


def test_a_sidecar_is_found_in_and_beside_the_checkpoint_and_by_name(imported: Source, tmp_path: Path) -> None:
    made = imported()
    places = [find_sidecar(made), find_sidecar(made / "release")]
    (tmp_path / ".metadata").touch()  # a checkpoint somewhere else
    places += [find_sidecar(tmp_path, made), find_sidecar(tmp_path, made / "hf_source")]
    assert {place.directory for place in places} == {made / "hf_source"}


def test_a_sidecar_knows_dtypes_shapes_and_originals(source: Source, imported: Source) -> None:
    sidecar = find_sidecar(imported())
    stored = stored_tensors(source())
    names = {"F32": torch.float32, "BF16": torch.bfloat16}
    assert {n: (t.info.dtype, list(t.info.shape)) for n, t in sidecar.tensors.items()} == {
        n: (names[dtype], shape) for n, (dtype, shape, _) in stored.items()
    }
    originals = {n: bytes(t.numpy()) for n, t in sidecar.originals().items()}
    assert originals == {n: data for n, (_, _, data) in stored.items() if n.endswith("linear_attn.norm.weight")}
    assert originals


def test_without_a_sidecar_the_message_names_the_option(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    with pytest.raises(CheckpointError, match=r"no hf_source in or next to.*source=DIR"):
        find_sidecar(tmp_path)
    with pytest.raises(CheckpointError, match="does not hold hf_source"):
        find_sidecar(tmp_path, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        "{}",
        '{"version": 2}',
        {"tensors": {"a": {"dtype": "F99", "shape": [1], "xxh3_128": ""}}},
        {"tensors": ["a"]},
        {"tensors": {"a": {"dtype": "F32"}}},
        {"left_out": None},
    ],
    ids=str,
)
def test_a_damaged_listing_is_refused(tmp_path: Path, content: str | dict[str, Any]) -> None:
    whole = {"version": 2, "tensors": {}, "carried": {}, "left_out": []}
    text = content if isinstance(content, str) else json.dumps({**whole, **content})
    (tmp_path / "source.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"source\.json (is damaged|is not a JSON object|must hold a JSON object)"
    ):
        find_sidecar(tmp_path, tmp_path)


def test_a_listing_of_a_later_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source.json").write_text('{"version": 3}')
    with pytest.raises(CheckpointError, match="unknown version 3"):
        find_sidecar(tmp_path, tmp_path)


def test_carried_tensors_that_are_not_listed_are_not_dropped(tmp_path: Path) -> None:
    case("Qwen3.5-VL").write(tmp_path / "hf")
    import_checkpoint(tmp_path / "hf", tmp_path / "megatron", vision="carry")
    path = tmp_path / "megatron" / "hf_source" / "source.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "carried": {}}))
    with pytest.raises(CheckpointError, match="does not list the tensors in carried/"):
        export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
