"""Pickles that are small and ask for much: time, stack or memory. Each case runs in a process with a limit on both.

`pickle` itself hashes, calls and nests whatever a file says; here that is an error that names the file.
"""

from __future__ import annotations

import io
import pickle
import resource
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import metadata

from megatron_fp32.checkpoint.formats.common_state import read_common_state
from megatron_fp32.checkpoint.formats.torch_dist import TorchDistReader
from megatron_fp32.checkpoint.formats.torch_dist_writer import TorchDistWriter
from megatron_fp32.errors import CheckpointError
from tests.checkpoint.support import change_metadata
from tests.support import in_a_child

NONE, STOP, MARK = pickle.NONE, pickle.STOP, pickle.MARK
DEEP = NONE + pickle.TUPLE1 * 150_000
"""A tuple in a tuple, and so on. `hash` of it overflows the stack."""
WIDE = NONE + b"".join(pickle.BINPUT + bytes([i]) + pickle.BINGET + bytes([i]) + pickle.TUPLE2 for i in range(40))
"""A tuple of 2^40 parts in 200 bytes."""
LIST = pickle.EMPTY_LIST * 5000 + pickle.APPEND * 4999


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _call(function: bytes, *arguments: bytes) -> bytes:
    return function + MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(raw)) + raw


INDEX = _global("torch.distributed.checkpoint.metadata", "MetadataIndex")
ENUM = _global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING")
SIZE = _global("torch", "Size")
SET, FROZENSET, ORDERED = (
    _global("builtins", "set"),
    _global("builtins", "frozenset"),
    _global("collections", "OrderedDict"),
)
PAIR = pickle.EMPTY_LIST + MARK


def _as_keys(key: bytes) -> dict[str, bytes]:
    return {
        "SETITEM": pickle.EMPTY_DICT + key + NONE + pickle.SETITEM,
        "SETITEMS": pickle.EMPTY_DICT + MARK + key + NONE + pickle.SETITEMS,
        "DICT": MARK + key + NONE + pickle.DICT,
        "ADDITEMS": pickle.EMPTY_SET + MARK + key + pickle.ADDITEMS,
        "FROZENSET": MARK + key + pickle.FROZENSET,
        "set": _call(SET, PAIR + key + pickle.APPENDS),
        "frozenset": FROZENSET + PAIR + key + pickle.APPENDS + pickle.TUPLE1 + pickle.NEWOBJ,
        "OrderedDict": _call(ORDERED, PAIR + PAIR + key + NONE + pickle.APPENDS + pickle.APPENDS),
        "in a tuple": pickle.EMPTY_DICT + key + pickle.TUPLE1 + NONE + pickle.SETITEM,
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "iter_0000007"
    directory.mkdir()
    with TorchDistWriter(directory) as writer:
        writer.write("a", torch.arange(6.0))
        writer.finish({"iteration": 7})
    return directory


FILES = (".metadata", "common.pt", "data.pkl")


def _put(checkpoint: Path, file: str, content: bytes) -> Path:
    """Make the content that of a pickle; the file that a message must name."""
    if file == ".metadata":
        (checkpoint / file).write_bytes(content)
        return checkpoint / file
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(24))
    if file == "common.pt":
        (checkpoint / file).write_bytes(blob.getvalue())
        return checkpoint / file
    data = checkpoint / "__0_0.distcp"
    data.write_bytes(blob.getvalue())

    def point(m: Any) -> None:
        (index,) = (index for index in m.storage_data if index.fqn == "a")
        m.storage_data[index].offset, m.storage_data[index].length = 0, len(blob.getvalue())

        for other in [other for other in m.storage_data if other.fqn != "a"]:
            del m.storage_data[other]

    change_metadata(checkpoint, point)
    return data


READERS: dict[str, Callable[[Path], Any]] = {
    ".metadata": lambda path: TorchDistReader(path),
    "common.pt": lambda path: read_common_state(TorchDistReader(path)),
    "data.pkl": lambda path: TorchDistReader(path).read("a"),
}


def _messages(checkpoints: list[tuple[str, Path]]) -> list[str]:
    """With which messages they are refused, each in 20 seconds of processor time."""
    messages = []
    for file, path in checkpoints:
        spent = int(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
        resource.setrlimit(resource.RLIMIT_CPU, (spent + 20, resource.RLIM_INFINITY))
        try:
            READERS[file](path)
            messages.append("it was read")
        except CheckpointError as error:
            messages.append(str(error))
    return messages


def _refused(checkpoint: Path, *cases: tuple[str, bytes]) -> list[str]:
    """The messages with which files are refused, each in 20 seconds of processor time, all of them in 2 GB."""
    named, checkpoints = [], []
    for index, (file, content) in enumerate(cases):
        place = shutil.copytree(checkpoint, checkpoint.parent / str(index))
        named.append(_put(place, file, content))
        checkpoints.append((file, place))
    messages = in_a_child(_messages, checkpoints, memory=2 * 10**9)
    for path, message in zip(named, messages, strict=True):
        assert str(path) in message, message
        assert len(message) < 2000
    return messages


class TestKeys:
    @pytest.mark.parametrize("key", [WIDE, DEEP], ids=["wide", "deep"])
    def test_a_key_that_takes_long_to_hash_is_refused(self, checkpoint: Path, key: bytes) -> None:
        cases = [("common.pt", content + STOP) for content in _as_keys(key).values()]
        cases += [(file, _as_keys(key)["SETITEM"] + STOP) for file in FILES]
        assert all("too many parts" in message for message in _refused(checkpoint, *cases))

    def test_a_field_of_a_key_counts(self, checkpoint: Path) -> None:
        state = pickle.EMPTY_DICT + _text("fqn") + WIDE + pickle.SETITEM + pickle.BUILD
        index = INDEX + pickle.EMPTY_TUPLE + pickle.NEWOBJ + state
        content = pickle.EMPTY_DICT + index + NONE + pickle.SETITEM + STOP
        (message,) = _refused(checkpoint, (".metadata", content))
        assert "too many parts" in message

    def test_integers_with_one_hash_are_refused(self, checkpoint: Path) -> None:
        keys = b"".join(pickle.LONG1 + b"\x0b" + (i * (2**61 - 1)).to_bytes(11, "little") for i in range(1, 200_000))
        (message,) = _refused(checkpoint, ("common.pt", pickle.EMPTY_SET + MARK + keys + pickle.ADDITEMS + STOP))
        assert "more than 60 bits" in message

    def test_keys_that_checkpoints_have_are_read(self, checkpoint: Path) -> None:
        state = {
            "ids": {1, 2.5, None, "a", (1, ("b", 2)), frozenset({3})},
            "by tuple": {("a", 0): 1},
            "ordered": OrderedDict([("b", 1), ("a", [2])]),
        }
        torch.save(state, checkpoint / "common.pt")
        assert read_common_state(TorchDistReader(checkpoint)) == state


class TestCalls:
    @pytest.mark.parametrize("value", [WIDE, DEEP, LIST], ids=["wide", "deep", "lists"])
    def test_arguments_that_take_long_to_print_or_to_hash_are_refused(self, checkpoint: Path, value: bytes) -> None:
        calls = {
            ".metadata": [_call(ENUM, value), _call(SIZE, value), _call(INDEX, _text("a"), value)],
            "common.pt": [
                _call(_global("signal", "Signals"), value),
                _call(_global("torch", "device"), value),
                _call(_global("numpy", "dtype"), value),
                _call(_global("builtins", "getattr"), _global("builtins", "complex"), value),
                _call(_global("torch._utils", "_rebuild_tensor_v2"), NONE, NONE, value, value, NONE, NONE),
            ],
        }
        messages = _refused(checkpoint, *((file, call + STOP) for file, some in calls.items() for call in some))
        assert all("with arguments of a wrong type, or too many" in message for message in messages)

    def test_a_persistent_id_that_is_none_is_refused(self, checkpoint: Path) -> None:
        cases = [("common.pt", value + pickle.BINPERSID + STOP) for value in (WIDE, DEEP, NONE)]
        assert all("persistent id" in message for message in _refused(checkpoint, *cases))

    def test_more_classes_than_a_checkpoint_has_are_refused(self, checkpoint: Path) -> None:
        content = b"".join(_global("m", f"C{i}") + pickle.POP for i in range(100_000)) + NONE + STOP
        (message,) = _refused(checkpoint, ("common.pt", content))
        assert "more than 4096 unknown classes" in message


class TestState:
    """State goes to what the pickle has made itself, and to nothing that others share or that was checked before."""

    def test_of_a_member_of_an_enumeration(self, checkpoint: Path) -> None:
        state = pickle.EMPTY_DICT + _text("_value_") + _text("changed") + pickle.SETITEM + pickle.BUILD
        content = _call(ENUM, pickle.BININT1 + b"\0") + state + STOP
        _put(checkpoint, ".metadata", content)
        with pytest.raises(CheckpointError, match="sets the state of a _MEM_FORMAT_ENCODING"):
            TorchDistReader(checkpoint)
        assert metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT.value == 0

    @pytest.mark.parametrize("file", ["common.pt", "data.pkl"])
    def test_of_a_tensor_whose_shape_was_checked(self, checkpoint: Path, file: str) -> None:
        size = pickle.BININT1 + b"\6" + pickle.TUPLE1
        pid = (_text("storage"), _global("torch", "FloatStorage"), _text("0"), _text("cpu"), pickle.BININT1 + b"\6")
        storage = MARK + b"".join(pid) + pickle.TUPLE + pickle.BINPERSID
        ones = pickle.BININT1 + b"\1" + pickle.TUPLE1
        tensor = _call(
            _global("torch._utils", "_rebuild_tensor_v2"),
            storage, pickle.BININT1 + b"\0", size, ones, pickle.NEWFALSE, _call(ORDERED),
        )  # fmt: skip
        state = pickle.EMPTY_DICT + _text("offset") + pickle.BININT + struct.pack("<i", 2**30) + pickle.SETITEM
        (message,) = _refused(checkpoint, (file, tensor + state + pickle.BUILD + STOP))
        assert "sets the state of a" in message

    def test_that_replaces_methods(self, checkpoint: Path) -> None:
        state = pickle.EMPTY_DICT + _text("keys") + SET + pickle.SETITEM + pickle.BUILD
        content = pickle.EMPTY_DICT + _text("a") + _call(ORDERED) + state + pickle.SETITEM + STOP
        _put(checkpoint, "common.pt", content)
        with pytest.raises(CheckpointError, match="replaces methods"):
            read_common_state(TorchDistReader(checkpoint))


class TestNesting:
    def test_a_common_state_that_nobody_can_print_is_refused(self, checkpoint: Path) -> None:
        stand_in, space = _global("some.where", "Class"), _global("types", "SimpleNamespace")
        calls = stand_in * 2000 + NONE + (pickle.TUPLE1 + pickle.REDUCE) * 2000
        states = (space + pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.EMPTY_DICT + _text("a")) * 2000
        states += NONE + (pickle.SETITEM + pickle.BUILD) * 2000
        values = (WIDE, DEEP, LIST, calls, states)
        cases = [("common.pt", pickle.EMPTY_DICT + _text("args") + value + pickle.SETITEM + STOP) for value in values]
        assert all("nested on more than" in message for message in _refused(checkpoint, *cases))

    def test_what_holds_itself_is_refused(self, checkpoint: Path) -> None:
        state: dict[str, Any] = {}
        state["self"] = [state]
        torch.save(state, checkpoint / "common.pt")
        with pytest.raises(CheckpointError, match=r"common\.pt.*contains itself"):
            read_common_state(TorchDistReader(checkpoint))

    def test_what_is_there_many_times_is_read(self, checkpoint: Path) -> None:
        shared = [list(range(50)), {"a": (1, 2)}]
        state = {"args": [shared] * 200, "inner": {"b": {"c": [[[1]]]}}}
        torch.save(state, checkpoint / "common.pt")
        assert read_common_state(TorchDistReader(checkpoint)) == state

    def test_elsewhere_only_what_is_needed_is_looked_at(self, checkpoint: Path) -> None:
        files = (".metadata", "data.pkl")
        _refused(checkpoint, *((file, value + STOP) for file in files for value in (DEEP, LIST, WIDE)))


READERS: dict[str, Callable[[Path], Any]] = {
    ".metadata": TorchDistReader,
    "common.pt": lambda path: read_common_state(TorchDistReader(path)),
    "data.pkl": lambda path: TorchDistReader(path).read("a"),
}


@pytest.mark.parametrize("file", FILES)
def test_text_and_numbers_that_cannot_be_printed_are_refused(checkpoint: Path, file: str) -> None:
    million = 10**6
    for content, expected in (
        (_text("\ud800"), "utf-8"),
        (pickle.SHORT_BINUNICODE + b"\3\xed\xa0\x80", "utf-8"),
        (pickle.BINUNICODE8 + struct.pack("<Q", 3) + b"\xed\xa0\x80", "utf-8"),
        (pickle.UNICODE + b"\\ud800\n", "surrogates"),
        (pickle.LONG4 + struct.pack("<i", million) + b"\x7f" * million, "an integer of 1000000 bytes"),
        (pickle.LONG4 + struct.pack("<i", 2**31 - 1), "an integer of 2147483647 bytes"),
        (pickle.LONG + b"9" * million + b"L\n", "digits"),
        (pickle.INT + b"9" * million + b"\n", "digits"),
    ):
        _put(checkpoint, file, pickle.EMPTY_DICT + _text("a") + content + pickle.SETITEM + STOP)
        with pytest.raises(CheckpointError, match=expected):
            READERS[file](checkpoint)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    "content",
    [
        NONE + pickle.LONG_BINPUT + b"\xff" * 4 + NONE,
        NONE + pickle.PUT + b"9" * 4000 + b"\n" + NONE,
        pickle.GET + b"9" * 4000 + b"\n",
        pickle.PROTO + b"\4" + pickle.FRAME + struct.pack("<Q", 2**62),
        pickle.BINBYTES8 + struct.pack("<Q", 2**40),
        pickle.BINUNICODE8 + struct.pack("<Q", 2**64 - 1),
        pickle.BINSTRING + struct.pack("<i", 2**31 - 1),
        pickle.BYTEARRAY8 + struct.pack("<Q", 2**40),
        pickle.EXT4 + struct.pack("<i", 1),
        NONE + pickle.BINPERSID,
        SET + MARK + WIDE + pickle.APPENDS,
        _global("types", "SimpleNamespace") + pickle.EMPTY_TUPLE + pickle.REDUCE + NONE + pickle.APPEND,
        pickle.EMPTY_LIST + NONE + NONE + pickle.SETITEM,
        pickle.EMPTY_DICT + MARK + NONE + pickle.ADDITEMS,
        pickle.SETITEMS, pickle.ADDITEMS, pickle.APPENDS, pickle.SETITEM, pickle.BUILD, pickle.NEWOBJ, pickle.REDUCE,
    ],
    ids=range(21),
)  # fmt: skip
def test_operations_that_make_no_sense_are_refused(checkpoint: Path, file: str, content: bytes) -> None:
    _put(checkpoint, file, content + STOP)
    with pytest.raises(CheckpointError):
        READERS[file](checkpoint)


def test_tensors_that_share_their_chunks_are_refused(checkpoint: Path) -> None:
    def share(m: Any) -> None:
        entry = m.state_dict_metadata["a"]
        entry.chunks = entry.chunks * 20_000
        for i in range(2000):
            m.state_dict_metadata[f"a{i}"] = entry

    change_metadata(checkpoint, share)
    with pytest.raises(CheckpointError, match=r"\.metadata.*more of them than the file has bytes"):
        TorchDistReader(checkpoint)


def test_a_metadata_file_of_any_size_is_not_read(checkpoint: Path) -> None:
    with (checkpoint / ".metadata").open("r+b") as file:
        file.truncate(2**40)  # of holes
    with pytest.raises(CheckpointError, match="has 1099511627776 bytes"):
        TorchDistReader(checkpoint)
