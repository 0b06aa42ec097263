"""Files that are no weights: which are taken along, and which would do harm."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.fp8 import named_scheme
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.cli import main
from megatron_fp32.errors import CheckpointError
from tests.checkpoint.support import tree
from tests.families import case


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    case("Qwen3").write(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def megatron(hf: Path, tmp_path: Path) -> Path:
    import_checkpoint(hf, tmp_path / "megatron")
    return tmp_path / "megatron"


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "MODEL.SAFETENSORS",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "extra/model.safetensors",
        "model.safetensors/file",
        "pytorch_model.bin",
        "hf_quant_config.json/file",
        "quantize_config.json/file",
        "adapter_config.json",
    ],
)
def test_weights_among_the_assets_are_refused(name: str, hf: Path, megatron: Path, tmp_path: Path) -> None:
    path = megatron / "hf_source" / "assets" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: torch.zeros_like(t) for n, t in load_file(hf / "model.safetensors").items()}, path)
    result = CliRunner().invoke(main, ["export", str(megatron), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert Path(name).parts[0].split("/")[0] in result.output
    assert not list(tmp_path.glob("*out*"))


def test_megatron_checkpoints_in_a_source_are_no_assets(hf: Path, megatron: Path, tmp_path: Path) -> None:
    before = {name for name in tree(hf) if (hf / name).is_file()}
    shutil.copytree(megatron / "release", hf / "iter_0000010")
    shutil.copytree(megatron, hf / "run")
    (hf / "latest_checkpointed_iteration.txt").write_text("10")
    (hf / "docs").mkdir()
    (hf / "docs" / "metadata.json").write_text("{}")
    import_checkpoint(hf, tmp_path / "again")
    export_checkpoint(tmp_path / "again", tmp_path / "out")
    quantize_checkpoint(hf, tmp_path / "fp8", named_scheme("blockwise"))
    for directory in (tmp_path / "out", tmp_path / "fp8"):
        found = {name for name in tree(directory) if (directory / name).is_file()}
        assert found == before | {"docs/metadata.json"}


def test_a_snapshot_of_the_hub_cache_is_copied(hf: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (hf / "sub").mkdir()
    (hf / "sub" / "merges.txt").write_text("a b")
    for number, name in enumerate(sorted(n for n in tree(hf) if (hf / n).is_file())):
        shutil.copyfile(hf / name, blobs / str(number))
        (snapshot / name).parent.mkdir(exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    import_checkpoint(snapshot, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    copied, expected = tree(tmp_path / "out"), tree(hf)
    assert copied.keys() == expected.keys()
    assert all(copied[name] == expected[name] for name in expected if name != "model.safetensors")
    assert not any(path.is_symlink() for path in (tmp_path / "megatron").rglob("*"))


def _dangling(path: Path, outside: Path) -> None:
    path.symlink_to("../../blobs/0")


def _loop(path: Path, outside: Path) -> None:
    path.symlink_to(path.name)


def _leaves(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "secret")


def _leaves_upwards(path: Path, outside: Path) -> None:
    path.symlink_to(os.path.relpath(outside / "secret", path.parent))


def _to_directory(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def _pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def _device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [_dangling, _loop, _leaves, _leaves_upwards, _to_directory, _pipe, _device])
@pytest.mark.parametrize("side", ["import", "quantize", "export"])
@pytest.mark.parametrize("name", ["tokenizer.json", "a\nb", "a\udc80"])
def test_what_is_no_file_of_the_directory_is_refused(
    make: object, side: str, name: str, hf: Path, megatron: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    place = megatron / "hf_source" / "assets" if side == "export" else hf
    (place / name).unlink(missing_ok=True)
    make(place / name, outside)  # type: ignore[operator]
    source = megatron if side == "export" else hf
    options = ["--scheme", "blockwise"] if side == "quantize" else []
    result = CliRunner().invoke(main, [side, str(source), str(tmp_path / "out"), *options])
    assert result.exit_code == 1, result.output
    assert str(place) in result.output
    assert not list(tmp_path.glob("*out*"))


def test_an_adapter_in_a_folder_of_its_own_is_an_asset_on_both_sides(hf: Path, tmp_path: Path) -> None:
    (hf / "lora").mkdir()
    (hf / "lora" / "adapter_config.json").write_text("{}")
    (hf / "adapter_model_card.md").write_text("")
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    assert (tmp_path / "out" / "lora" / "adapter_config.json").is_file()
    assert (tmp_path / "out" / "adapter_model_card.md").is_file()


def test_blobs_of_a_cache_that_was_moved(hf: Path, tmp_path: Path) -> None:
    cache, moved = tmp_path / "models--a--b", tmp_path / "other disk"
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    moved.mkdir()
    (cache / "blobs").symlink_to(moved)
    for name in sorted(n for n in tree(hf) if (hf / n).is_file()):
        shutil.copyfile(hf / name, moved / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    import_checkpoint(snapshot, tmp_path / "megatron")
    assert (tmp_path / "megatron" / "hf_source" / "assets" / "config.json").read_bytes() == (
        hf / "config.json"
    ).read_bytes()


def test_a_link_within_the_directory_is_copied(hf: Path, tmp_path: Path) -> None:
    (hf / "linked.json").symlink_to("config.json")
    import_checkpoint(hf, tmp_path / "megatron")
    copied = tmp_path / "megatron" / "hf_source" / "assets" / "linked.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (hf / "config.json").read_bytes()


@pytest.mark.parametrize(
    "kind", ["dangling", "file", "directory", "link", "below a file", "below a dangling link", "staged"]
)
def test_an_output_that_cannot_be_made_is_refused_before_the_source_is_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if kind == "dangling":
        out.symlink_to("nowhere")
    elif kind == "file":
        out.write_text("")
    elif kind == "directory":
        out.mkdir()
    elif kind == "link":
        out.symlink_to(tmp_path)
    elif kind == "below a file":
        (tmp_path / "file").write_text("")
        out = tmp_path / "file" / "out"
    elif kind == "below a dangling link":
        (tmp_path / "link").symlink_to("nowhere")
        out = tmp_path / "link" / "out"
    else:
        (tmp_path / ".out.partial").symlink_to("nowhere")
    before = sorted(path.name for path in tmp_path.iterdir())
    nothing = tmp_path / "no source"
    for run in (
        lambda: import_checkpoint(nothing, out),
        lambda: export_checkpoint(nothing, out),
        lambda: quantize_checkpoint(nothing, out, "blockwise"),
    ):
        with pytest.raises(CheckpointError, match=r"exists already|does not exist|a directory") as refusal:
            run()
        assert str(nothing) not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_parent_that_may_not_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    with pytest.raises(CheckpointError, match=f"you may not write to {tmp_path}"):
        import_checkpoint(tmp_path / "no source", tmp_path / "out")


@pytest.mark.parametrize("inside", ["source in output", "output in source"])
def test_an_output_beside_or_inside_the_source(inside: str, hf: Path, tmp_path: Path) -> None:
    """What grows is not carried, and the source stays what it was."""
    if inside == "source in output":
        with pytest.raises(CheckpointError, match="exists already"):
            import_checkpoint(hf, tmp_path)
        return
    before = {name: bits for name, bits in tree(hf).items() if (hf / name).is_file()}
    import_checkpoint(hf, hf / "megatron")
    export_checkpoint(hf / "megatron", tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.distcp"))
    assert all(tree(hf)[name] == bits for name, bits in before.items())


def _invoke(side: str, source: Path, out: Path) -> Result:
    options = ["--scheme", "modelopt"] if side == "quantize" else []
    return CliRunner().invoke(main, [side, str(source), str(out), *options])


@pytest.mark.parametrize("name", ["MODEL.SAFETENSORS", "model-00001-of-00001.safetensors/a", "iter_0000010/args.yaml"])
def test_what_an_export_would_refuse_is_not_imported(name: str, hf: Path, tmp_path: Path) -> None:
    (hf / name).parent.mkdir(exist_ok=True)
    (hf / name).write_text("{}")
    import_checkpoint(hf, tmp_path / "megatron")
    export_checkpoint(tmp_path / "megatron", tmp_path / "out")
    quantize_checkpoint(hf, tmp_path / "fp8", "blockwise")
    for directory in (tmp_path / "megatron" / "hf_source" / "assets", tmp_path / "out", tmp_path / "fp8"):
        assert (directory / "config.json").is_file()
        assert not (directory / name).exists()


@pytest.mark.parametrize("side", ["import", "quantize"])
@pytest.mark.parametrize("name", ["hf_quant_config.json", "quantize_config.json", "recipe.yaml"])
def test_a_directory_with_the_name_of_a_file(name: str, side: str, hf: Path, tmp_path: Path) -> None:
    (hf / name).mkdir()
    result = _invoke(side, hf, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{hf / name} is a directory with the name of a file" in result.output
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("side", ["import", "quantize"])
@pytest.mark.parametrize("make", [_dangling, _loop, _pipe, _device])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00001.safetensors"]
)
def test_weights_that_are_no_file(name: str, make: object, side: str, hf: Path, tmp_path: Path) -> None:
    if name == "model-00001-of-00001.safetensors":
        names = load_file(hf / "model.safetensors")
        (hf / "model.safetensors").unlink()
        (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    (hf / name).unlink(missing_ok=True)
    make(hf / name, tmp_path)  # type: ignore[operator]
    result = _invoke(side, hf, tmp_path / "out")
    assert result.exit_code == 1
    linked = make in (_dangling, _loop)
    expected = f"is a link to {(hf / name).readlink()}, which cannot be reached" if linked else "must be a regular file"
    assert f"{hf / name} {expected}" in result.output
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("side", ["import", "quantize", "export"])
@pytest.mark.parametrize("place", ["output", "parts", "lock", "output/config.json", "a pipe as lock"])
def test_nothing_is_written_through_what_lies_in_the_staging_directory(
    place: str, side: str, hf: Path, megatron: Path, tmp_path: Path
) -> None:
    staging, elsewhere = tmp_path / ".out.partial", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    planted = staging / ("lock" if place == "a pipe as lock" else place)
    planted.parent.mkdir(parents=True)
    if place == "a pipe as lock":
        os.mkfifo(planted)
    else:
        planted.symlink_to(elsewhere if place in ("output", "parts") else elsewhere / "precious")
    result = _invoke(side, megatron if side == "export" else hf, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{planted} must be" in result.output
    assert tree(elsewhere).keys() == {"precious"}
    assert (elsewhere / "precious").read_text() == "precious"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["none/..", "n" * 250, "n" * 300])
@pytest.mark.parametrize("side", ["import", "quantize", "export"])
def test_a_name_that_no_output_can_have(name: str, side: str, hf: Path, megatron: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    result = _invoke(side, megatron if side == "export" else hf, tmp_path / name)
    assert result.exit_code == 1
    assert ("must end with the name of a directory" if name == "none/.." else "File name too long") in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == before
