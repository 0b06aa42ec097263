"""What a worker believes of a manifest, and what hostile bytes cost it."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fp32.errors import TransferError
from megatron_fp32.transfer.manifest import Manifest
from megatron_fp32.weights.tensors import DTYPES, TensorInfo
from tests.support import in_a_child

ROW = ["w", "BF16", [2, 3]]


def packed(*rows: Any) -> bytes:
    """Lines of JSON, as the module's docstring has them."""
    return zlib.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode())


def bomb(parts: Iterable[bytes]) -> bytes:
    compressor = zlib.compressobj()
    return b"".join([*(compressor.compress(part) for part in parts), compressor.flush()])


def head(*, version: Any = 1, bucket_bytes: Any = 256, sha256: Any = False, carried: Any = 0, tensors: Any = 1) -> Any:
    return [version, bucket_bytes, sha256, carried, tensors]


def test_the_format_of_the_cases_below_is_the_one_that_is_read() -> None:
    found = Manifest.from_bytes(packed(head(version=3, carried=1, sha256=True), "tower", ROW))
    info = TensorInfo(dtype=torch.bfloat16, shape=(2, 3))
    assert found == Manifest(version=3, tensors={"w": info}, bucket_bytes=256, sha256=True, carried=("tower",))


@given(
    names=st.lists(st.text(), unique=True),
    sizes=st.lists(st.integers(0, 2**18), max_size=2),
    dtype=st.sampled_from(sorted(DTYPES)),
    carried=st.lists(st.text()),
    sha256=st.booleans(),
)
def test_what_is_written_is_read(
    names: list[str], sizes: list[int], dtype: str, carried: list[str], sha256: bool
) -> None:
    info = TensorInfo(dtype=DTYPES[dtype], shape=(*sizes, 2))
    manifest = Manifest(
        version=7, tensors=dict.fromkeys(names, info), bucket_bytes=1 << 30, sha256=sha256, carried=tuple(carried)
    )
    found = Manifest.from_bytes(manifest.to_bytes())
    assert found == manifest
    assert list(found.tensors) == names


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "it is cut off"),
        (b"not compressed", "zlib|error"),
        (packed(head(), ROW)[:-5], "cut off"),
        (packed(head(), ROW) + b"x", "got more bytes"),
        (packed(head(), ROW) + bytes(1 << 20), "got more bytes"),
        (zlib.compress(b"[1, 256, false, 0, 0]"), "expected the end of a line"),
        (packed(), "cut off"),
        (packed(head()), "cut off"),
        (packed(head(carried=2), "a"), "cut off"),
        (packed(head(), ROW, ROW), "expected 1 tensors, got more"),
        (packed(head(), ROW, None), "expected 1 tensors, got more"),
        (packed(head(tensors=2), ROW, ROW), "tensor 'w' comes twice"),
        (packed({"version": 1}), "ValueError"),
        (packed(1), "TypeError"),
        (packed(head(version=-1), ROW), "expected a count"),
        (packed(head(version=1.0), ROW), "expected a count"),
        (packed(head(version=True), ROW), "expected a count"),
        (packed(head(version=2**63), ROW), "expected a count"),
        (packed(head(bucket_bytes=2**60), ROW), "expected a count"),
        (packed(head(bucket_bytes="1"), ROW), "expected a count"),
        (packed(head(tensors=-1), ROW), "expected a count"),
        (packed(head(tensors=10**9), ROW), "expected a count"),
        (packed(head(tensors=600_000, carried=600_000), ROW), "at most 1000000 tensors"),
        (packed(head(sha256=1), ROW), "expected a bool"),
        (packed(head(carried=1), 5, ROW), "expected a name"),
        (packed(head(), [5, "BF16", [2]]), "expected a name"),
        (packed(head(), ["w", "BF16"]), "ValueError"),
        (packed(head(), "wBF"), "expected a dtype"),
        (packed(head(), ["w", "bfloat16", [2]]), "expected a dtype"),
        (packed(head(), ["w", ["BF16"], [2]]), "expected a dtype"),
        (packed(head(), ["w", "BF16", 2]), "expected a shape"),
        (packed(head(), ["w", "BF16", "12"]), "expected a shape"),
        (packed(head(), ["w", "BF16", {"2": 1}]), "expected a shape"),
        (packed(head(), ["w", "BF16", [-1, -1]]), "expected a shape"),
        (packed(head(), ["w", "BF16", [2.0]]), "expected a shape"),
        (packed(head(), ["w", "BF16", [True]]), "expected a shape"),
        (packed(head(), ["w", "BF16", [1] * 65]), "expected a shape"),
        (packed(head(), ["w", "BF16", [0, 2**62, 2**62]]), "expected a shape"),
        (packed(head(), ["w", "BF16", [10**4000]]), "expected a shape"),
        (packed(head(), ["w", "BF16", [2**40]]), "expected at most 1099511627776 bytes"),
        (packed(head(), ["w", "F4", []]), "expected an even number"),
        (packed(head(), ["w", "F4", [4, 3]]), "expected an even number"),
        (zlib.compress(b"[1, 256, false, 0, 1]\n" + b"[" * 60_000 + b"\n"), "RecursionError|JSONDecodeError"),
        (zlib.compress(b"1" * 60_000 + b"\n"), "ValueError"),
        (zlib.compress(b"\xff\xfe\xff\n"), "Error"),
        (zlib.compress(b"[" + b" " * 70_000 + b"1, 256, false, 0, 0]\n"), "expected lines of at most 65536 bytes"),
    ],
    ids=itertools.count(),
)
def test_what_nobody_writes_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(TransferError, match=rf"(?s)^this is not a manifest: .*({message})") as refused:
        Manifest.from_bytes(data)
    assert len(str(refused.value)) < 300


BOMBS = {
    "a line": lambda: bomb([b'["'] + [b"a" * (1 << 20)] * 200),
    "empty lists": lambda: bomb([b"["] + [b"[]," * (1 << 18)] * 100),
    "blank lines": lambda: bomb([b"[1, 256, false, 0, 1]\n"] + [b"\n" * (1 << 20)] * 200),
    "tensors": lambda: bomb([b"[1, 256, false, 0, 1000000]\n"] + [b'["w", "F32", [1]]\n' * 50_000] * 100),
    "long names": lambda: bomb(
        b'["%05d%s", "F32", [1]]\n' % (at, b"a" * 60_000) if at else b"[1, 256, false, 0, 1000000]\n"
        for at in range(8_000)
    ),
}


def refusal(name: str) -> str:
    data = BOMBS[name]()
    try:
        Manifest.from_bytes(data)
    except TransferError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_message_does_not_take_much_memory(name: str) -> None:
    memory = 400 << 20 if name == "long names" else 64 << 20
    assert in_a_child(refusal, name, memory=memory).startswith("this is not a manifest: ")


@given(st.binary(max_size=200), st.integers(0, 10), st.binary(max_size=3))
def test_damage_is_an_error_or_a_manifest(noise: bytes, at: int, more: bytes) -> None:
    good = b'[1, 256, false, 1, 2]\n"c"\n["v", "F32", []]\n["w", "BF16", [2, 3]]\n'
    for text in (noise, good[:at] + noise + good[at:], good[: -at or None] + more):
        try:
            assert isinstance(Manifest.from_bytes(zlib.compress(text)), Manifest)
        except TransferError:
            continue


def test_a_dtype_that_nobody_reads_is_not_announced() -> None:
    tensors = {"w": TensorInfo(dtype=torch.complex128, shape=(2,))}
    with pytest.raises(TransferError, match=r"tensor 'w' cannot be sent: expected a dtype of safetensors, got "):
        Manifest(version=1, tensors=tensors, bucket_bytes=256, sha256=False).to_bytes()
