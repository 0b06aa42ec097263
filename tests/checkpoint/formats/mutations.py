"""Changes of a file's bytes, for Hypothesis: other bits, numbers, texts and pickle operations, cuts and copies."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Mutation = Callable[[bytes], bytes]

_NUMBERS = [0, 1, 7, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]

_TEXTS = [
    b"",
    b"0",
    b"-1",
    b"9" * 20,
    b"1e9",
    b"null",
    b"true",
    b"[]",
    b"{}",
    b'""',
    b'"',
    b"}",
    b"[" * 50,
    b"[" * 200_000,
    b"[" * 120 + b"]" * 120,
    b"9" * 5000,
    b"1e999",
    b"NaN",
    b"-Infinity",
    b'"\\ud800"',
    b"\xff",
    b"/",
]

_NESTED = [
    pickle.TUPLE1 * 150_000,
    pickle.EMPTY_LIST * 3000 + pickle.APPEND * 2999,
    b"".join(pickle.LONG_BINPUT + bytes([i, 9, 0, 0]) + pickle.LONG_BINGET + bytes([i, 9, 0, 0]) + pickle.TUPLE2
             for i in range(50)),
    b"".join(pickle.DUP + pickle.TUPLE2 for _ in range(50)),
    pickle.EMPTY_DICT + pickle.BUILD,
    pickle.EMPTY_TUPLE + pickle.REDUCE,
    pickle.EMPTY_TUPLE + pickle.NEWOBJ,
    pickle.TUPLE1 + pickle.REDUCE,
    pickle.MARK + pickle.DUP,
    pickle.EMPTY_SET + pickle.MARK + pickle.BINGET + b"\0" + pickle.ADDITEMS,
    pickle.LONG_BINPUT + b"\xff" * 4,
    pickle.LONG4 + b"\xff\xff\xff\x7f",
]  # fmt: skip
"""Operations of pickles."""


@st.composite
def mutations(draw: Any) -> Mutation:
    """One to four changes, one after another."""
    steps = draw(st.lists(_steps(), min_size=1, max_size=4))

    def mutate(content: bytes) -> bytes:
        for step in steps:
            content = step(content)
        return content

    return mutate


def _steps() -> st.SearchStrategy[Mutation]:
    place = st.integers(0, 2**20)
    size = st.integers(1, 64)
    return st.one_of(
        st.builds(_flip, place, st.integers(0, 7)),
        st.builds(_replace, place, st.just(1), st.binary(min_size=1, max_size=1)),
        st.builds(_replace, place, size, st.binary(max_size=16)),
        st.builds(_replace, place, st.just(0), st.binary(min_size=1, max_size=16)),
        st.builds(_replace, place, size, st.just(b"")),
        st.builds(_copy, place, place, size),
        st.builds(_number, place, st.sampled_from([2, 4, 8]), st.sampled_from(_NUMBERS)),
        st.builds(_digits, place, st.sampled_from(_TEXTS) | st.integers(-5, 10**6).map(lambda n: str(n).encode())),
        st.builds(_replace, place, st.integers(0, 2), st.sampled_from(_NESTED)),
        st.builds(_truncate, place),
        st.builds(lambda tail: lambda content: content + tail, st.binary(min_size=1, max_size=64)),
    )


def _flip(place: int, bit: int) -> Mutation:
    def change(content: bytes) -> bytes:
        at = place % max(len(content), 1)
        return content[:at] + bytes([byte ^ 1 << bit for byte in content[at : at + 1]]) + content[at + 1 :]

    return change


def _replace(place: int, size: int, new: bytes) -> Mutation:
    def change(content: bytes) -> bytes:
        at = place % (len(content) + 1)
        return content[:at] + new + content[at + size :]

    return change


def _copy(source: int, place: int, size: int) -> Mutation:
    def change(content: bytes) -> bytes:
        at = source % (len(content) + 1)
        return _replace(place, size, content[at : at + size])(content)

    return change


def _number(place: int, size: int, value: int) -> Mutation:
    return _replace(place, size, (value % 2 ** (8 * size)).to_bytes(size, "little"))


def _digits(place: int, text: bytes) -> Mutation:
    """Put a text in the place of one of the numbers that a text has."""

    def change(content: bytes) -> bytes:
        runs = [
            at for at in range(len(content)) if content[at : at + 1].isdigit() and not content[at - 1 : at].isdigit()
        ]
        if not runs:
            return content
        end = at = runs[place % len(runs)]
        while content[end : end + 1].isdigit():
            end += 1
        return content[:at] + text + content[end:]

    return change


def _truncate(place: int) -> Mutation:
    return lambda content: content[: place % (len(content) + 1)]
