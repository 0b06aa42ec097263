from __future__ import annotations

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from megatron_fp32.weights.mapping import ConcatRows, GatedQkv, Mapping, Rename, SplitRows, ZeroCentred
from tests.support import full_mantissa

_few = settings(max_examples=25, deadline=None, derandomize=True)
_size = st.integers(1, 7)
_rows = st.lists(_size, min_size=1, max_size=4)


def _numbered(mapping: Mapping) -> list[Tensor]:
    """Hugging Face tensors in which no value occurs twice, so that every misplaced one shows."""
    start, tensors = 0, []
    for spec in mapping.hf:
        count = torch.Size(spec.shape).numel()
        tensors.append(torch.arange(start, start + count).reshape(spec.shape))
        start += count
    return tensors


def _assert_is_a_bijection(mapping: Mapping) -> None:
    tensors = _numbered(mapping)
    there = mapping.to_megatron(tensors)
    assert [tuple(t.shape) for t in there] == [spec.shape for spec in mapping.megatron]
    assert torch.cat([t.flatten() for t in there]).sort().values.equal(torch.cat([t.flatten() for t in tensors]))
    back = mapping.to_hf(there)
    assert len(back) == len(tensors)
    assert all(torch.equal(a, b) for a, b in zip(back, tensors, strict=True))
    # The other way round: what to_hf makes of arbitrary Megatron tensors comes back too.
    shuffled = [t.flatten()[torch.randperm(t.numel())].reshape(t.shape) for t in there]
    again = mapping.to_megatron(mapping.to_hf(shuffled))
    assert all(torch.equal(a, b) for a, b in zip(again, shuffled, strict=True))


@_few
@given(rows=_size, columns=_size)
def test_a_rename_moves_every_value_once(rows: int, columns: int) -> None:
    _assert_is_a_bijection(Rename("a", "b", (rows, columns)))


@_few
@given(rows=_rows, columns=_size)
def test_row_blocks_are_split_and_joined_again(rows: list[int], columns: int) -> None:
    parts = [(f"part{i}", count) for i, count in enumerate(rows)]
    _assert_is_a_bijection(SplitRows("whole", parts, (1, columns)))
    _assert_is_a_bijection(ConcatRows(parts, "whole", (columns,)))


@_few
@given(rows=_rows, groups=_size, columns=_size)
def test_row_blocks_that_recur_are_split_and_joined_again(rows: list[int], groups: int, columns: int) -> None:
    parts = [(f"part{i}", count * groups) for i, count in enumerate(rows)]
    _assert_is_a_bijection(SplitRows("whole", parts, (columns,), groups=groups))
    _assert_is_a_bijection(ConcatRows(parts, "whole", (1, columns), groups=groups))


@_few
@given(groups=_size, heads_per_group=_size, head_dim=_size, hidden=_size)
def test_qkv_has_for_each_group_its_queries_then_k_and_v(
    groups: int, heads_per_group: int, head_dim: int, hidden: int
) -> None:
    rows = [("q", groups * heads_per_group * head_dim), ("k", groups * head_dim), ("v", groups * head_dim)]
    mapping = ConcatRows(rows, "qkv", (hidden,), groups=groups)
    q, k, v = _numbered(mapping)
    expected: list[Tensor] = []
    for group in range(groups):
        for head in range(group * heads_per_group, (group + 1) * heads_per_group):
            expected.extend(q[head * head_dim + row] for row in range(head_dim))
        for source in (k, v):
            expected.extend(source[group * head_dim + row] for row in range(head_dim))
    assert torch.equal(mapping.to_megatron([q, k, v])[0], torch.stack(expected))


@_few
@given(key_heads=_size, values_per_key=_size, key_dim=_size, value_dim=_size)
def test_blocks_by_key_head_come_apart_as_transformers_reads_them(
    key_heads: int, values_per_key: int, key_dim: int, value_dim: int
) -> None:
    """`fix_query_key_value_ordering` of transformers' Qwen3-Next, on the rows of the weight."""
    values = key_heads * values_per_key * value_dim
    parts = [("query", key_heads * key_dim), ("key", key_heads * key_dim), ("value", values), ("z", values)]
    mapping = SplitRows("qkvz", parts, (3,), groups=key_heads)
    (whole,) = _numbered(mapping)
    module = types.SimpleNamespace(
        num_k_heads=key_heads, num_v_heads=key_heads * values_per_key, head_k_dim=key_dim, head_v_dim=value_dim
    )
    ba = torch.arange(2 * module.num_v_heads)[None, None]
    theirs = Qwen3NextGatedDeltaNet.fix_query_key_value_ordering(module, whole.t()[None], ba)
    for ours, activation in zip(mapping.to_megatron([whole]), theirs, strict=False):
        assert torch.equal(ours, activation[0].reshape(3, -1).t())
    rows = [("beta", module.num_v_heads), ("alpha", module.num_v_heads)]
    beta, alpha = SplitRows("ba", rows, (), groups=key_heads).to_megatron([ba[0, 0]])
    assert torch.equal(beta, theirs[4].flatten())
    assert torch.equal(alpha, theirs[5].flatten())


def test_an_element_of_a_stack_knows_its_place() -> None:
    mapping = Rename("experts.down_proj", "decoder.layers.3.fc2", (4, 2)).place(megatron=lambda s: s.in_stack(5, 8))
    assert mapping.hf[0].stored_shape == (4, 2)
    (spec,) = mapping.place(megatron=lambda s: s.in_stack(3, 6, "decoder.layers.fc2")).megatron
    assert (spec.name, spec.index, spec.stack, spec.shape) == ("decoder.layers.fc2", (3, 5), (6, 8), (4, 2))
    assert spec.stored_shape == (6, 8, 4, 2)
    assert str(spec) == "decoder.layers.fc2[3, 5]"
    assert mapping.megatron[0].index == (5,)  # the mapping that was placed stays where it was


def test_row_blocks_keep_their_order() -> None:
    whole = torch.arange(12).reshape(6, 2)
    split = SplitRows("whole", [("first", 1), ("second", 3), ("third", 2)], (2,))
    assert [t.tolist() for t in split.to_megatron([whole])] == [[[0, 1]], [[2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11]]]
    concat = ConcatRows([("first", 1), ("second", 5)], "whole", (2,))
    assert torch.equal(concat.to_megatron([whole[:1], whole[1:]])[0], whole)


@_few
@given(groups=_size, heads_per_group=_size, head_dim=_size, hidden=_size)
def test_gated_qkv_is_a_bijection(groups: int, heads_per_group: int, head_dim: int, hidden: int) -> None:
    _assert_is_a_bijection(_gated_qkv(groups, heads_per_group, head_dim, hidden))


@_few
@given(groups=_size, heads_per_group=_size, head_dim=_size, hidden=_size)
def test_gated_qkv_puts_each_row_where_megatron_reads_it(
    groups: int, heads_per_group: int, head_dim: int, hidden: int
) -> None:
    mapping = _gated_qkv(groups, heads_per_group, head_dim, hidden)
    q_gate, k, v = _numbered(mapping)
    rows: list[Tensor] = []
    for group in range(groups):
        heads = range(group * heads_per_group, (group + 1) * heads_per_group)
        for offset in (0, 1):  # all queries of the group, then all gates; Hugging Face alternates them by head
            for head in heads:
                rows.extend(q_gate[(2 * head + offset) * head_dim + row] for row in range(head_dim))
        for source in (k, v):
            rows.extend(source[group * head_dim + row] for row in range(head_dim))
    assert torch.equal(mapping.to_megatron([q_gate, k, v])[0], torch.stack(rows))


def _gated_qkv(groups: int, heads_per_group: int, head_dim: int, hidden: int) -> GatedQkv:
    return GatedQkv(
        "q", "k", "v", "qkv", heads=groups * heads_per_group, groups=groups, head_dim=head_dim, hidden=hidden
    )


@pytest.mark.parametrize(
    "mapping",
    [
        Rename("a", "b", (3, 2)),
        SplitRows("whole", [("x", 1), ("y", 2)], (2,)),
        ConcatRows([("x", 1), ("y", 2)], "whole", (2,)),
        SplitRows("whole", [("x", 2), ("y", 4)], (2,), groups=2),
        ConcatRows([("x", 2), ("y", 4)], "whole", (2,), groups=2),
        _gated_qkv(1, 2, 3, 2),
    ],
    ids=lambda mapping: type(mapping).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_invertible_mapping_keeps_every_bit_pattern(mapping: Mapping, dtype: torch.dtype) -> None:
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    patterns = torch.tensor([1 << (8 * dtype.itemsize - 1), -1, 1, 0], dtype=torch.int64).to(bits)  # -0, NaN, tiny, 0
    count = [torch.Size(spec.shape).numel() for spec in mapping.hf]
    tensors = [
        patterns.repeat(n)[:n].view(dtype).reshape(spec.shape) for n, spec in zip(count, mapping.hf, strict=True)
    ]
    back = mapping.to_hf(mapping.to_megatron(tensors))
    assert mapping.invertible
    assert all(t.dtype == dtype for t in back)
    assert all(torch.equal(a.view(bits), b.view(bits)) for a, b in zip(back, tensors, strict=True))


def test_zero_centring_loses_bits_of_small_fp32_values_and_says_so() -> None:
    mapping = ZeroCentred("w", "w-1", (4096,))
    w = full_mantissa(4096)
    (back,) = mapping.to_hf(mapping.to_megatron([w]))
    small = w.abs() < 0.5
    assert not mapping.invertible
    assert (back != w)[small].float().mean() > 0.3
    assert torch.equal(back[(w >= 0.5) & (w <= 2)], w[(w >= 0.5) & (w <= 2)])  # Sterbenz: both sums are exact


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_zero_centring_gives_back_every_16_bit_weight_between_1_128th_and_64(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    w = every[(every.float().abs() >= 2**-7) & (every.float().abs() <= 64)]
    mapping = ZeroCentred("w", "w-1", tuple(w.shape))
    (stored,) = mapping.to_megatron([w])
    assert stored.dtype == torch.float32
    assert torch.equal(stored.double(), w.double() - 1)
    assert torch.equal(mapping.to_hf([stored])[0].to(dtype).view(torch.int16), w.view(torch.int16))
