"""Conversions that end at any moment, and go on when they are called again."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fp32.checkpoint.convert import export_checkpoint, import_checkpoint
from megatron_fp32.checkpoint.formats.safetensors_writer import SafetensorsFile
from megatron_fp32.checkpoint.formats.torch_dist_writer import DataFile
from megatron_fp32.checkpoint.jobs import import_job
from megatron_fp32.checkpoint.jobs.run import Part, run_job
from megatron_fp32.checkpoint.jobs.staging import Staging, open_staging
from megatron_fp32.checkpoint.quantize import quantize_checkpoint
from megatron_fp32.errors import CheckpointError
from tests.conftest import Source

SMALL = 4000
"""Bytes of a file, so that a tiny checkpoint has many."""

Convert = Callable[[Path], Any]


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


@pytest.fixture(params=["import", "export", "quantize"])
def convert(request: pytest.FixtureRequest, source: Source, imported: Source) -> Convert:
    hf, megatron = source(), imported()
    if request.param == "import":
        return lambda out: import_checkpoint(hf, out, max_part_bytes=SMALL)
    if request.param == "export":
        return lambda out: export_checkpoint(megatron, out, max_shard_bytes=SMALL)
    return lambda out: quantize_checkpoint(hf, out, "blockwise", max_shard_bytes=SMALL)


def killed(convert: Convert, out: Path, event: int) -> bool:
    """Run in a process that kills itself before its `event`-th operation below `out.parent`; whether it did."""
    child = os.fork()
    if child == 0:
        count = 0

        def audit(name: str, args: tuple[Any, ...]) -> None:
            nonlocal count
            if name.split(".")[0] in ("open", "os", "shutil", "fcntl") and str(out.parent) in str(args):
                count += 1
                if count == event:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            convert(out)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the conversion failed by itself"
    return status != 0


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_kill_at_any_operation_and_a_second_call(convert: Convert, tmp_path: Path) -> None:
    convert(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    assert len(expected) > 6
    moments = random.Random(0)
    event, ended = 1, False
    while not ended:
        place = tmp_path / f"at{event}"
        place.mkdir()
        ended = not killed(convert, place / "out", event)
        if not (place / "out").exists():
            convert(place / "out")
        assert contents(place / "out") == expected
        if not ended:
            # The last moment of all leaves the staging directory to the next call.
            left = [path.name for path in place.iterdir()]
            assert left == ["out"] or set(left) == {"out", ".out.partial"}
        event += moments.randint(1, 6)


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_many_kills_one_after_another(convert: Convert, tmp_path: Path) -> None:
    convert(tmp_path / "whole")
    moments = random.Random(1)
    place, runs = tmp_path / "killed", 0
    place.mkdir()
    # The first operations of a run find out what is there: few of them get nowhere.
    while not (place / "out").exists() and killed(convert, place / "out", moments.randint(30, 120)):
        runs += 1
        assert runs < 200
    assert runs > 2
    assert contents(place / "out") == contents(tmp_path / "whole")


def test_parts_that_are_done_are_not_done_again(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _full_disk(monkeypatch, DataFile, call=9)
    with pytest.raises(OSError, match="No space left"):
        import_checkpoint(source(), tmp_path / "out", max_part_bytes=SMALL)
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    done = contents(tmp_path / ".out.partial" / "output" / "release")
    assert done
    assert not any("unfinished" in name for name in done)
    monkeypatch.undo()
    written: list[str] = []
    write = DataFile.write

    def noting(self: DataFile, name: str, *args: Any, **kwargs: Any) -> None:
        written.append(name)
        write(self, name, *args, **kwargs)

    monkeypatch.setattr(DataFile, "write", noting)
    told: dict[str, int] = {}

    def progress(action: str, nbytes: int, total: int) -> None:
        told[action] = told.get(action, 0) + nbytes
        told["total"] = total

    import_checkpoint(source(), tmp_path / "out", max_part_bytes=SMALL, progress=progress)
    assert told["write"] == told["verify"] == told["total"]
    after = contents(tmp_path / "out" / "release")
    assert {name: after[name] for name in done} == done
    assert "embedding.word_embeddings.weight" not in written, "the first tensor was converted twice"
    assert "output_layer.weight" in written


@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_disk_that_takes_no_more(convert: Convert, tmp_path: Path) -> None:
    """The kernel's own refusal, in the middle of a file, whoever writes it."""
    convert(tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    largest = max(len(content) for name, content in expected.items() if name.endswith((".distcp", ".safetensors")))
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 100, largest - 100))
        try:
            convert(tmp_path / "out")
        except OSError as error:
            os._exit(17 if error.errno == errno.EFBIG else 18)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        os._exit(19)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 17
    assert (tmp_path / ".out.partial" / "job.json").is_file()
    convert(tmp_path / "out")
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("error", [OSError(116, "Stale file handle"), MemoryError("no more")], ids=["disk", "memory"])
def test_a_source_that_cannot_be_read_for_now(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    read, calls = import_job.HuggingFaceReader.read, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 9:
            raise CheckpointError("cannot be read") from error
        return read(self, *args)

    monkeypatch.setattr(import_job.HuggingFaceReader, "read", failing)
    with pytest.raises(CheckpointError, match="cannot be read"):
        import_checkpoint(source(), tmp_path / "out", max_part_bytes=SMALL)
    assert list((tmp_path / ".out.partial" / "parts").iterdir())


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_source_that_changes_is_noticed(source: Source, imported: Source, tmp_path: Path, way: str) -> None:
    made = source() if way == "import" else imported()
    own = Path(shutil.copytree(made, tmp_path / "own"))
    touched = own / "config.json" if way == "import" else next((own / "release").glob("*.distcp"))
    calls: list[str] = []

    def change(action: str, nbytes: int, total: int) -> None:
        calls.append(action)
        if len(calls) == 5:
            os.utime(touched)

    convert = import_checkpoint if way == "import" else export_checkpoint
    with pytest.raises(CheckpointError, match=r"the \w+ in .*own.* has changed during the conversion"):
        convert(own, tmp_path / "out", progress=change)
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_output_inside_of_its_source(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Path(shutil.copytree(source(), tmp_path / "own"))
    _full_disk(monkeypatch, DataFile, call=9)
    with pytest.raises(OSError, match="No space left"):
        import_checkpoint(own, own / "megatron", max_part_bytes=SMALL)
    monkeypatch.undo()
    import_checkpoint(own, own / "megatron", max_part_bytes=SMALL)
    import_checkpoint(source(), tmp_path / "elsewhere", max_part_bytes=SMALL)
    assert contents(own / "megatron") == contents(tmp_path / "elsewhere")


def _full_disk(monkeypatch: pytest.MonkeyPatch, writer: type, *, call: int) -> None:
    write, calls = writer.write, []

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        write(self, *args, **kwargs)

    monkeypatch.setattr(writer, "write", failing)


def test_an_interrupted_export_goes_on(imported: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = SafetensorsFile.write, []

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 12:
            raise KeyboardInterrupt
        write(self, *args, **kwargs)

    monkeypatch.setattr(SafetensorsFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_checkpoint(imported(), tmp_path / "out", max_shard_bytes=SMALL)
    monkeypatch.undo()
    report = export_checkpoint(imported(), tmp_path / "out", max_shard_bytes=SMALL)
    assert report.unchanged == report.tensors


class TestWorkers:
    def test_several_make_the_same_bytes(self, source: Source, tmp_path: Path) -> None:
        told: dict[str, int] = {}

        def progress(action: str, nbytes: int, total: int) -> None:
            told[action] = told.get(action, 0) + nbytes
            told["total"] = total

        one = import_checkpoint(source(), tmp_path / "one", max_part_bytes=SMALL)
        two = import_checkpoint(source(), tmp_path / "two", max_part_bytes=SMALL, workers=2, progress=progress)
        assert told["write"] == told["verify"] == told["total"] == one.nbytes
        assert contents(tmp_path / "two") == contents(tmp_path / "one")
        assert (one.tensors, one.fp32_tensors) == (two.tensors, two.fp32_tensors)
        for workers in (1, 2):
            out = tmp_path / f"hf{workers}"
            export_checkpoint(tmp_path / "one", out, max_shard_bytes=SMALL, workers=workers)
        assert contents(tmp_path / "hf1") == contents(tmp_path / "hf2")

    def test_their_errors_arrive(self, source: Source, tmp_path: Path) -> None:
        hf = Path(shutil.copytree(source(), tmp_path / "hf"))
        import_checkpoint(hf, tmp_path / "megatron", max_part_bytes=SMALL)
        data = tmp_path / "megatron" / "release" / "__1_0.distcp"
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        with pytest.raises(CheckpointError, match=rf"{data.name}.*damaged"):
            export_checkpoint(tmp_path / "megatron", tmp_path / "out", max_shard_bytes=SMALL, workers=2)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]

    def test_they_never_see_an_interruption(self, tmp_path: Path) -> None:
        """Ctrl-C reaches every process of a terminal; a worker may still import torch then, and would print that."""
        parts = [Part(file=f"{name}.distcp", nbytes=1) for name in "ab"]
        job: Any = SimpleNamespace(parts=parts, options={}, sources={}, reopen=_tell_of_signals)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        with pytest.raises(CheckpointError, match="SIGINT is blocked: True"):
            run_job(job, tmp_path / "out", workers=2)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before

    def test_fewer_than_one(self, source: Source, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
            import_checkpoint(source(), tmp_path / "out", workers=0)
        assert list(tmp_path.iterdir()) == []

    def test_a_kill_of_the_first_process_alone(self, source: Source, tmp_path: Path) -> None:
        """Its workers are still at work when the next run begins."""
        import_checkpoint(source(), tmp_path / "whole", max_part_bytes=SMALL)
        script = (
            "import sys\n"
            "from megatron_fp32.checkpoint.convert import import_checkpoint\n"
            "if __name__ == '__main__':\n"
            "    tell = lambda *_: print('told', flush=True)\n"
            f"    import_checkpoint(sys.argv[1], sys.argv[2], max_part_bytes={SMALL}, workers=2, progress=tell)\n"
        )
        (tmp_path / "script.py").write_text(script)
        command = [sys.executable, str(tmp_path / "script.py"), str(source()), str(tmp_path / "out")]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        first = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True)
        assert first.stdout is not None
        assert first.stdout.readline() == b"told\n"
        first.kill()
        first.wait()
        import_checkpoint(source(), tmp_path / "out", max_part_bytes=SMALL)
        time.sleep(0.5)
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert not (tmp_path / ".out.partial").exists()


@contextlib.contextmanager
def _tell_of_signals() -> Iterator[Any]:
    raise CheckpointError(f"SIGINT is blocked: {signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())}")
    yield


class TestStaging:
    def test_two_at_once(self, tmp_path: Path) -> None:
        with open_staging(tmp_path / "out", {"job": 1}):
            with (
                pytest.raises(CheckpointError, match=r"another process is at work in .*out\.partial"),
                open_staging(tmp_path / "out", {"job": 1}),
            ):
                pass
            assert (tmp_path / ".out.partial" / "job.json").is_file()

    def test_parts_of_another_conversion(self, source: Source, tmp_path: Path) -> None:
        with pytest.raises(OSError, match="full"), open_staging(tmp_path / "out", {"job": "another"}):
            raise OSError("full")
        before = contents(tmp_path)
        with pytest.raises(
            CheckpointError, match=r"out\.partial holds parts of another conversion.*Delete this directory"
        ):
            import_checkpoint(source(), tmp_path / "out")
        assert contents(tmp_path) == before

    def test_another_source_of_the_same_name(self, source: Source, tmp_path: Path) -> None:
        hf = Path(shutil.copytree(source(), tmp_path / "hf"))
        with pytest.MonkeyPatch.context() as patch:
            _full_disk(patch, DataFile, call=9)
            with pytest.raises(OSError, match="No space"):
                import_checkpoint(hf, tmp_path / "out", max_part_bytes=SMALL)
        config = json.loads((hf / "config.json").read_text())
        (hf / "config.json").write_text(json.dumps({**config, "comment": 1}))
        with pytest.raises(CheckpointError, match="holds parts of another conversion: the source"):
            import_checkpoint(hf, tmp_path / "out", max_part_bytes=SMALL)

    def test_a_part_has_its_name_only_when_it_is_whole(self, tmp_path: Path) -> None:
        with open_staging(tmp_path / "out", {}) as staging:
            assert isinstance(staging, Staging)
            broken = pytest.raises(FileExistsError)
            with broken, staging.file("a/part") as path:
                path.write_text("half")
                path.mkdir()
            assert list((staging.output / "a").iterdir()) == []
            with staging.file("a/part") as path:
                path.write_text("whole")
                assert not (staging.output / "a" / "part").exists()
            staging.publish()
        assert contents(tmp_path) == {"out/a/part": b"whole"}
