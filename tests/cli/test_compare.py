"""`megatron-fp32 verify` and `inspect`: exit statuses, what goes where, and that nothing is cut off."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from megatron_fp32 import cli
from megatron_fp32.checkpoint.convert import import_checkpoint
from tests.checkpoint.support import A_LOG, NORM, rewrite, stored_tensors
from tests.families import case, unfuse
from tests.qwen3_5 import write_small
from tests.support import run_command

Pair = tuple[Path, Path]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("compare")
    hf = write_small(root / "hf")
    import_checkpoint(hf, root / "megatron")
    return hf, root / "megatron"


@pytest.fixture
def changed(pair: Pair, tmp_path: Path) -> Path:
    """Without lm_head, with one more tensor, a shorter norm, other values in A_log, and dt_bias in fp32."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors["lm_head.weight"]
        tensors[A_LOG][4] += 0.5
        tensors[NORM] = tensors[NORM][1:].clone()
        bias = A_LOG.replace("A_log", "dt_bias")
        return {**tensors, "more": torch.ones(3), bias: tensors[bias].float()}

    shutil.copytree(pair[0], tmp_path / "changed")
    return rewrite(tmp_path / "changed", change)


def _blocks(text: str) -> dict[str, list[str]]:
    """Names of the tensors that `verify` lists, each with its lines; a line that was wrapped comes whole."""
    found: dict[str, list[str]] = {}
    for block in re.findall(r"^(\S*[^:\s])\n((?:  .+\n)+)", text, re.MULTILINE):
        found[block[0]] = [line.strip() for line in block[1].replace("\n    ", " ").splitlines()]
    return found


def _json(result: Result) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(name))
    return content


class TestVerify:
    def test_equal_checkpoints_have_status_0(self, pair: Pair) -> None:
        hf, megatron = pair
        count = len(stored_tensors(hf))
        for a, b in ((hf, megatron), (megatron, hf), (hf, hf), (megatron, megatron)):
            result = run_command("verify", a, b)
            assert result.exit_code == 0, result.output
            assert f"A: {a}: " in result.stdout
            assert f"B: {b}: " in result.stdout
            of = f"{count} of {count}" if hf in (a, b) else r"(\d+) of \1"
            assert re.search(rf"^equal: {of} byte for byte$", result.stdout, re.MULTILINE)
            assert result.stderr == ""

    def test_differences_have_status_1_and_are_listed(self, pair: Pair, changed: Path) -> None:
        result = run_command("verify", pair[0], changed)
        assert result.exit_code == 1
        found = _blocks(result.stdout)
        bias = A_LOG.replace("A_log", "dt_bias")
        assert list(found) == ["lm_head.weight", "more", NORM, A_LOG, bias]
        assert found["lm_head.weight"] == ["only in A; BF16 [57, 27]"]
        assert found["more"] == ["only in B; F32 [3]"]
        assert found[NORM] == ["other shape; F32 [22] in A, F32 [21] in B"]
        before = torch.frombuffer(bytearray(stored_tensors(pair[0])[A_LOG][2]), dtype=torch.float32)[4]
        a, b = float(before), float(before + 0.5)
        assert found[A_LOG] == [
            "other values: 1 of 9; F32 [9]",
            f"largest |a - b|: 0.5 at [4], {a:.9g} in A, {b:.9g} in B",
            f"largest relative difference: {0.5 / b:.4g} at [4]",
        ]
        assert found[bias] == ["same values, other dtype; BF16 [9] in A, F32 [9] in B"]
        total = len(stored_tensors(pair[0])) - 2
        *_, counts, more, verdict = result.stdout.splitlines()
        assert f"{counts} {more.strip()}" == (
            "only in A: 1; only in B: 1; other shape: 1; other values: 1; same values, other dtype: 1"
        )
        assert verdict == f"DIFFERENT: {total - 2} of {total} byte for byte"

    def test_a_limit_hides_what_comes_last_and_says_so(self, pair: Pair, changed: Path) -> None:
        short = run_command("verify", pair[0], changed, "--limit", "2")
        assert short.exit_code == 1
        assert "and 3 more; --limit 0 lists all of them" in short.stdout
        assert list(_blocks(short.stdout)) == ["lm_head.weight", "more"]
        assert (
            run_command("verify", pair[0], changed, "--limit", "0").stdout
            == run_command("verify", pair[0], changed).stdout
        )

    def test_values_only_accepts_another_dtype_and_nothing_else(
        self, pair: Pair, changed: Path, tmp_path: Path
    ) -> None:
        hf, megatron = pair
        shutil.copytree(hf, tmp_path / "wide")
        rewrite(tmp_path / "wide", lambda tensors: {n: t.float() for n, t in tensors.items()})
        for other in (hf, megatron):
            assert run_command("verify", other, tmp_path / "wide").exit_code == 1
            result = run_command("verify", other, tmp_path / "wide", "--values-only")
            assert result.exit_code == 0
            assert "equal: " in result.stdout
            assert "same values, other dtype: " in result.stdout
        assert run_command("verify", hf, changed, "--values-only").exit_code == 1

    def test_json_is_all_of_stdout(self, pair: Pair, changed: Path) -> None:
        result = run_command("verify", changed, pair[1], "--json")
        assert result.exit_code == 1
        assert result.stderr == ""
        content = _json(result)
        assert (content["agrees"], content["values_only"]) == (False, False)
        assert (content["a"]["kind"], content["b"]["kind"]) == ("huggingface", "megatron")
        found = {d["name"]: d for d in content["differences"]}
        assert {name: d["status"] for name, d in found.items()} == {
            "lm_head.weight": "only_b",
            "more": "only_a",
            NORM: "shape",
            A_LOG: "values",
            A_LOG.replace("A_log", "dt_bias"): "dtype",
        }
        assert found["more"]["a"] == {"dtype": "F32", "shape": [3]}
        assert found["more"]["b"] is None
        assert found[A_LOG]["values"]["absolute"]["size"] == 0.5
        assert found[A_LOG]["values"]["absolute"]["index"] == [4]
        equal = run_command("verify", *pair, "--json", "--values-only")
        assert (equal.exit_code, _json(equal)["agrees"], _json(equal)["values_only"]) == (0, True, True)

    def test_a_source_and_text_only_arrive(self, tmp_path: Path) -> None:
        hf = write_small(tmp_path / "hf", released_names=True)
        import_checkpoint(hf, tmp_path / "megatron", vision="carry")
        shutil.copytree(tmp_path / "megatron" / "release", tmp_path / "elsewhere")
        assert run_command("verify", hf, tmp_path / "elsewhere").exit_code == 1
        assert run_command("verify", hf, tmp_path / "elsewhere", "--source", tmp_path / "megatron").exit_code == 0
        result = run_command("verify", hf, tmp_path / "elsewhere", "--text-only")
        assert result.exit_code == 0
        assert "left out as asked" in result.stdout

    def test_two_layouts_of_one_model_are_equal(self, tmp_path: Path) -> None:
        fused = case("Qwen3-MoE, fused").write(tmp_path / "fused")
        shutil.copytree(fused, tmp_path / "separate")
        separate = rewrite(tmp_path / "separate", unfuse)
        count = len(stored_tensors(separate))
        for a, b in ((fused, separate), (separate, fused)):
            result = run_command("verify", a, b)
            assert (result.exit_code, result.stderr) == (0, ""), result.output
            assert result.stdout.splitlines()[-1] == f"equal: {count} of {count} byte for byte"
        start = "model.layers.1.mlp.experts."
        rewrite(separate, lambda tensors: {n: t * 2 if n.startswith(f"{start}3.up") else t for n, t in tensors.items()})
        result = run_command("verify", fused, separate)
        assert result.exit_code == 1
        assert _blocks(result.stdout)[f"{start}3.up_proj.weight"][-1] == f"{start}gate_up_proj[3] in A"
        assert "compared by name alone" not in result.stdout

        (separate / "config.json").unlink()
        result = run_command("verify", fused, separate)
        assert (result.exit_code, result.stderr) == (1, "")
        assert f"compared by name alone, other layouts were not paired: no config.json in {separate}" in result.stdout
        assert result.stdout.splitlines()[-1].startswith("DIFFERENT: ")
        assert str(separate) in _json(run_command("verify", fused, separate, "--json"))["names_only"]

    def test_a_text_model_beside_one_with_vision(self, tmp_path: Path) -> None:
        released = write_small(tmp_path / "released", released_names=True)
        shutil.copytree(released, tmp_path / "alone")
        config = json.loads((released / "config.json").read_text())
        (tmp_path / "alone" / "config.json").write_text(json.dumps(config["text_config"]))
        alone = rewrite(
            tmp_path / "alone",
            lambda tensors: {
                name.replace("model.language_model.", "model."): tensor
                for name, tensor in tensors.items()
                if not name.startswith("model.visual.")
            },
        )
        result = run_command("verify", released, alone, "--json")
        assert result.exit_code == 1
        vision = {name for name in stored_tensors(released) if name.startswith("model.visual.")}
        assert {d["name"]: d["status"] for d in _json(result)["differences"]} == dict.fromkeys(vision, "only_a")
        for a, b in ((released, alone), (alone, released)):
            assert run_command("verify", a, b, "--text-only").exit_code == 0

    def test_unreadable_checkpoints_have_status_2(self, pair: Pair, tmp_path: Path) -> None:
        shutil.copytree(pair[0], tmp_path / "damaged")
        (tmp_path / "damaged" / "model.safetensors").write_bytes(b"damaged")
        (tmp_path / "empty").mkdir()
        for path, message in (("damaged", "is not a readable safetensors file"), ("empty", "is not a checkpoint")):
            for flags in ([], ["--json"]):
                result = run_command("verify", pair[0], tmp_path / path, *flags)
                assert (result.exit_code, result.stdout) == (2, "")
                assert message in result.stderr
        result = run_command("verify", pair[0], pair[0], "--source", pair[1])
        assert (result.exit_code, result.stdout) == (2, "")

    def test_long_names_and_brackets_come_whole(self, tmp_path: Path) -> None:
        name = ".".join(["a_module_with_a_long_name[bold]"] * 12)
        for at, directory in enumerate(("a[bold]", "b[/bold]")):
            (tmp_path / directory).mkdir(parents=True)
            save_file({name: torch.full((2,), float(at))}, tmp_path / directory / "model.safetensors")
        result = run_command("verify", tmp_path / "a[bold]", tmp_path / "b[/bold]")
        assert result.exit_code == 1
        for text in (name, str(tmp_path / "a[bold]"), str(tmp_path / "b[/bold]")):
            assert text in result.stdout

    def test_a_terminal_sees_progress_and_a_pipe_does_not(self, pair: Pair) -> None:
        command = [
            sys.executable,
            "-c",
            "from megatron_fp32.cli import main; main()",
            "verify",
            *map(str, pair),
            "--json",
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        assert run.stderr == ""
        assert json.loads(run.stdout)["agrees"]
        with_terminal = "from rich.console import Console; Console.is_terminal = True; " + command[2]
        run = subprocess.run(
            [command[0], "-c", with_terminal, *command[3:]], capture_output=True, text=True, check=True
        )
        assert "compare" in run.stderr
        assert json.loads(run.stdout)["agrees"]


class TestInspect:
    def test_hugging_face(self, pair: Pair) -> None:
        result = run_command("inspect", pair[0])
        assert (result.exit_code, result.stderr) == (0, "")
        stored = stored_tensors(pair[0])
        nbytes = sum(len(content) for *_, content in stored.values())
        assert "Qwen3.5 (model_type qwen3_5_text)" in result.stdout
        assert f"in {len(stored)} tensors, {nbytes:,} bytes" in result.stdout
        assert re.search(r"^F32 +2 +31 +124$", result.stdout, re.MULTILINE)
        assert "model.layers.*.linear_attn.A_log (1)" in result.stdout
        assert "optimizer" not in result.stdout

    def test_megatron(self, pair: Pair) -> None:
        result = run_command("inspect", pair[1])
        assert result.exit_code == 0
        for line in (
            r"iteration +release",
            r"optimizer +no; \d+ entries",
            r"layers +one by one",
            r"vision +no",
            r"MTP +no",
        ):
            assert re.search(rf"^ *{line}", result.stdout, re.MULTILINE), line
        assert f"{pair[1] / 'hf_source'}: {len(stored_tensors(pair[0]))} tensors, 0 carried" in result.stdout

    def test_tensors_are_listed_where_asked(self, pair: Pair) -> None:
        stored = stored_tensors(pair[0])
        assert "lm_head.weight" not in run_command("inspect", pair[0]).stdout
        listed = run_command("inspect", pair[0], "--tensors").stdout
        for name, (dtype, shape, content) in stored.items():
            assert re.search(
                rf"^{re.escape(name)} +{dtype} +{re.escape(str(shape))} +{len(content):,}$", listed, re.MULTILINE
            )
        some = run_command("inspect", pair[0], "--match", "*.q_*.weight").stdout
        assert {n for n in stored if n in some} == {n for n in stored if ".q_" in n}

    def test_json(self, pair: Pair) -> None:
        stored = stored_tensors(pair[0])
        result = run_command("inspect", pair[0], "--json", "--match", "*A_log")
        assert (result.exit_code, result.stderr) == (0, "")
        content = _json(result)
        assert content["listed"] == {A_LOG: {"dtype": "F32", "shape": [9], "nbytes": 36}}
        assert content["tensors"] == len(stored)
        assert content["fp32_tensors"] == [A_LOG, NORM]
        content = _json(run_command("inspect", pair[1], "--json", "--tensors"))
        assert content["megatron"]["release"] is True
        assert content["sidecar"]["path"] == str(pair[1] / "hf_source")
        assert len(content["listed"]) == content["tensors"]
        assert "listed" not in _json(run_command("inspect", pair[1], "--json"))

    def test_unreadable_checkpoints_have_status_2(self, tmp_path: Path) -> None:
        for flags in ([], ["--json"]):
            result = run_command("inspect", tmp_path, *flags)
            assert (result.exit_code, result.stdout) == (2, "")
            assert "is not a checkpoint" in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["verify"],
        ["verify", "."],
        ["verify", ".", "no/such/directory"],
        ["verify", ".", ".", "--limit", "-1"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_a_mistake_on_the_command_line_has_status_2(args: list[str]) -> None:
    result = run_command(*args)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize(
    ("command", "mentioned"),
    [
        (
            cli.verify.command,
            ["0 when A and B are equal, 1 when they differ, 2 for", "0.0 and -0.0", "NaN", "--source"],
        ),
        (cli.inspect.command, ["Exit status: 0, or 2", "--match GLOB"]),
    ],
    ids=["verify", "inspect"],
)
def test_help_suffices(command: Any, mentioned: list[str]) -> None:
    text = " ".join(run_command(command.name, "--help").stdout.split())
    assert [part for part in mentioned if part not in text] == []
    assert [
        param.opts[-1] for param in command.params if param.opts[-1].startswith("--") and param.opts[-1] not in text
    ] == []
    assert command.name in run_command("--help").stdout
