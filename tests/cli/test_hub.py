"""A Hub id in the place of a directory: what is fetched, and what is said. Nothing of this uses the network."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from megatron_fp32.cli.hub import FILES, NOT_FETCHED, HubId, parse_hub_id
from tests.checkpoint.support import stored_tensors
from tests.qwen3_5 import write_small
from tests.support import run_command

COMMIT = "0" * 40


class Hub:
    """Stands for huggingface_hub: every call must fit the real signature."""

    def __init__(self, snapshot: Path) -> None:
        self.snapshot = snapshot
        self.calls: list[dict[str, Any]] = []
        self.error: Exception | None = None

    def snapshot_download(self, *args: Any, **kwargs: Any) -> str:
        bound = inspect.signature(REAL).bind(*args, **kwargs)
        self.calls.append(dict(bound.arguments))
        if self.error is not None:
            raise self.error
        return str(self.snapshot)


REAL = huggingface_hub.snapshot_download


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """With one snapshot; the current directory is empty."""
    snapshot = tmp_path / "cache" / "models--Qwen--Qwen3-0.6B" / "snapshots" / COMMIT
    snapshot.parent.mkdir(parents=True)
    write_small(snapshot)
    found = Hub(snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", found.snapshot_download)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found


@pytest.mark.parametrize(
    ("given", "revision"),
    [
        ("Qwen/Qwen3-0.6B", None),
        ("Qwen/Qwen3-0.6B@v1.0", "v1.0"),
        ("Qwen/Qwen3-0.6B@refs/pr/3", "refs/pr/3"),
        ("https://huggingface.co/Qwen/Qwen3-0.6B", None),
        ("https://huggingface.co/Qwen/Qwen3-0.6B/tree/v1", "v1"),
        ("hf://Qwen/Qwen3-0.6B", None),
    ],
)
def test_what_an_id_means(given: str, revision: str | None) -> None:
    assert parse_hub_id(given) == HubId(repository="Qwen/Qwen3-0.6B", revision=revision)


@pytest.mark.parametrize(
    "given", ["model", "/data/model", "./a/b", "data/models/qwen", "a/b@", "a//b", "../b", "a/b@v 1"]
)
def test_what_is_not_an_id(given: str) -> None:
    assert parse_hub_id(given) is None


def test_the_files_that_are_fetched() -> None:
    wanted = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    others = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json.pkl",
        "model.pt",
        "original/consolidated.00.pth",
        "original/model.safetensors",
        "modeling_custom.py",
        "tf_model.h5",
        "model.gguf",
        ".gitattributes",
    ]
    found = filter_repo_objects([*wanted, *others], allow_patterns=list(FILES), ignore_patterns=list(NOT_FETCHED))
    assert list(found) == wanted


def test_an_import_and_what_it_says(hub: Hub, tmp_path: Path) -> None:
    result = run_command("import", "Qwen/Qwen3-0.6B@v1", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (call,) = hub.calls
    assert (call["repo_id"], call["revision"]) == ("Qwen/Qwen3-0.6B", "v1")
    assert (call["allow_patterns"], call["ignore_patterns"]) == (list(FILES), list(NOT_FETCHED))
    cache = huggingface_hub.constants.HF_HUB_CACHE
    assert result.stderr == f"megatron-fp32: fetching Qwen/Qwen3-0.6B@v1 from the Hugging Face Hub into {cache}\n"
    assert f"{len(stored_tensors(hub.snapshot))} tensors" in result.stdout


def test_every_command_that_reads_a_hugging_face_checkpoint(hub: Hub, tmp_path: Path) -> None:
    name = "Qwen/Qwen3-0.6B"
    for command in (
        ("inspect", name),
        ("verify", name, hub.snapshot),
        ("verify", hub.snapshot, name),
        ("quantize", name, tmp_path / "out", "--scheme", "channelwise"),
    ):
        hub.calls.clear()
        result = run_command(*command)
        assert (result.exit_code, len(hub.calls)) == (0, 1), (command, result.output)


@pytest.mark.parametrize("name", ["models/qwen3-4B", "models/qwen3-4B@v1", "other/qwen/"])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(hub: Hub, tmp_path: Path, name: str) -> None:
    write_small(Path("models/qwen3-4b"))
    result = run_command("import", name, tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "does not exist" in result.stderr
    assert hub.calls == []


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_what_exists_here_wins(hub: Hub, tmp_path: Path, kind: str) -> None:
    path = Path("Qwen/Qwen3-0.6B")
    path.parent.mkdir()
    if kind == "directory":
        write_small(path)
    elif kind == "file":
        path.write_text("")
    else:
        path.symlink_to("nowhere")
    result = run_command("import", path, tmp_path / "out")
    assert result.exit_code == (0 if kind == "directory" else 2), result.output
    assert hub.calls == []
    assert "fetching" not in result.stderr


@pytest.mark.parametrize(
    "error",
    [
        OSError(
            "401 Client Error.\n\nRepository Not Found for url: https://huggingface.co/api/models/Qwen/Qwen3-0.6B."
        ),
        ValueError("Cannot have -- or .. in repo_id: 'Qwen/Qwen3-0.6B'."),
        ConnectionError("offline mode is enabled"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_of_huggingface_hub_is_passed_on(hub: Hub, tmp_path: Path, error: Exception) -> None:
    hub.error = error
    result = run_command("import", "Qwen/Qwen3-0.6B", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[1:] == [
        "megatron-fp32: there is no directory Qwen/Qwen3-0.6B, and huggingface_hub cannot fetch Qwen/Qwen3-0.6B from "
        f"the Hub: {' '.join(str(error).split())}"
    ]
    assert run_command("verify", hub.snapshot, "Qwen/Qwen3-0.6B").exit_code == 2


def test_a_full_disk_keeps_its_remedy(hub: Hub, tmp_path: Path) -> None:
    hub.error = OSError(28, "No space left on device", "/cache/blobs/1")
    result = run_command("import", "Qwen/Qwen3-0.6B", tmp_path / "out")
    assert "/cache/blobs/1: No space left on device. What to do: make room on that disk" in result.stderr


def test_offline(tmp_path: Path) -> None:
    """The real huggingface_hub, with an empty cache and its switch for no network."""
    done = subprocess.run(
        [sys.executable, "-m", "megatron_fp32", "import", "Qwen/Qwen3-0.6B", str(tmp_path / "out")],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_OFFLINE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert (done.returncode, done.stdout) == (1, "")
    first, second = done.stderr.splitlines()
    assert first.endswith(f"from the Hugging Face Hub into {tmp_path / 'hub' / 'hub'}")
    assert "huggingface_hub cannot fetch Qwen/Qwen3-0.6B from the Hub: " in second
    assert "HF_HUB_OFFLINE" in second
    assert not (tmp_path / "out").exists()


def test_without_the_package_in_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_fp32.cli.hub import local
    from megatron_fp32.extras import MissingPackageError

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'megatron_fp32\[hub\]'"):
        local(HubId(repository="a/b"))
    assert local(Path("here")) == Path("here")


def test_the_stub_is_held_to_the_real_signature() -> None:
    assert isinstance(huggingface_hub, ModuleType)
    with pytest.raises(TypeError):
        inspect.signature(REAL).bind("a/b", allowed_patterns=[])
