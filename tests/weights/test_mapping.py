from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from megatron_fp32.weights.mapping import (
    RowRun,
    TensorMapping,
    concat_rows,
    gated_qkv,
    rename,
    shared,
    split_rows,
    transposed,
    zero_centred,
)
from megatron_fp32.weights.spec import TensorSpec
from tests.support import full_mantissa

_few = settings(max_examples=25, deadline=None, derandomize=True)
_size = st.integers(1, 7)
_rows = st.lists(_size, min_size=1, max_size=4)


def _numbered(mapping: TensorMapping) -> list[Tensor]:
    """Hugging Face tensors in which no value occurs twice, so that every misplaced one shows."""
    start, tensors = 0, []
    for spec in mapping.hf:
        count = torch.Size(spec.shape).numel()
        tensors.append(torch.arange(start, start + count).reshape(spec.shape))
        start += count
    return tensors


def _assert_is_a_bijection(mapping: TensorMapping) -> None:
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
    _assert_is_a_bijection(rename("a", "b", (rows, columns)))


@_few
@given(rows=_rows, columns=_size)
def test_row_blocks_are_split_and_joined_again(rows: list[int], columns: int) -> None:
    parts = [(f"part{i}", count) for i, count in enumerate(rows)]
    _assert_is_a_bijection(split_rows("whole", parts, (1, columns)))
    _assert_is_a_bijection(concat_rows(parts, "whole", (columns,)))


@_few
@given(rows=_rows, groups=_size, columns=_size)
def test_row_blocks_that_recur_are_split_and_joined_again(rows: list[int], groups: int, columns: int) -> None:
    parts = [(f"part{i}", count * groups) for i, count in enumerate(rows)]
    _assert_is_a_bijection(split_rows("whole", parts, (columns,), groups=groups))
    _assert_is_a_bijection(concat_rows(parts, "whole", (1, columns), groups=groups))


@_few
@given(groups=_size, heads_per_group=_size, head_dim=_size, hidden=_size)
def test_qkv_has_for_each_group_its_queries_then_k_and_v(
    groups: int, heads_per_group: int, head_dim: int, hidden: int
) -> None:
    rows = [("q", groups * heads_per_group * head_dim), ("k", groups * head_dim), ("v", groups * head_dim)]
    mapping = concat_rows(rows, "qkv", (hidden,), groups=groups)
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
    mapping = split_rows("qkvz", parts, (3,), groups=key_heads)
    (whole,) = _numbered(mapping)
    module = types.SimpleNamespace(
        num_k_heads=key_heads, num_v_heads=key_heads * values_per_key, head_k_dim=key_dim, head_v_dim=value_dim
    )
    ba = torch.arange(2 * module.num_v_heads)[None, None]
    theirs = Qwen3NextGatedDeltaNet.fix_query_key_value_ordering(module, whole.t()[None], ba)
    for ours, activation in zip(mapping.to_megatron([whole]), theirs, strict=False):
        assert torch.equal(ours, activation[0].reshape(3, -1).t())
    rows = [("beta", module.num_v_heads), ("alpha", module.num_v_heads)]
    beta, alpha = split_rows("ba", rows, (), groups=key_heads).to_megatron([ba[0, 0]])
    assert torch.equal(beta, theirs[4].flatten())
    assert torch.equal(alpha, theirs[5].flatten())


def test_an_element_of_a_stack_knows_its_place() -> None:
    mapping = rename("experts.down_proj", "decoder.layers.3.fc2", (4, 2)).place(megatron=lambda s: s.in_stack(5, 8))
    assert mapping.hf[0].stored_shape == (4, 2)
    (spec,) = mapping.place(megatron=lambda s: s.in_stack(3, 6, "decoder.layers.fc2")).megatron
    assert (spec.name, spec.index, spec.stack, spec.shape) == ("decoder.layers.fc2", (3, 5), (6, 8), (4, 2))
    assert spec.stored_shape == (6, 8, 4, 2)
    assert str(spec) == "decoder.layers.fc2[3, 5]"
    assert mapping.megatron[0].index == (5,)  # the mapping that was placed stays where it was


def test_row_blocks_keep_their_order() -> None:
    whole = torch.arange(12).reshape(6, 2)
    split = split_rows("whole", [("first", 1), ("second", 3), ("third", 2)], (2,))
    assert [t.tolist() for t in split.to_megatron([whole])] == [[[0, 1]], [[2, 3], [4, 5], [6, 7]], [[8, 9], [10, 11]]]
    concat = concat_rows([("first", 1), ("second", 5)], "whole", (2,))
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


def _gated_qkv(groups: int, heads_per_group: int, head_dim: int, hidden: int) -> TensorMapping:
    return gated_qkv(
        "q", "k", "v", "qkv", heads=groups * heads_per_group, groups=groups, head_dim=head_dim, hidden=hidden
    )


@pytest.mark.parametrize(
    "mapping",
    [
        rename("a", "b", (3, 2)),
        split_rows("whole", [("x", 1), ("y", 2)], (2,)),
        concat_rows([("x", 1), ("y", 2)], "whole", (2,)),
        split_rows("whole", [("x", 2), ("y", 4)], (2,), groups=2),
        concat_rows([("x", 2), ("y", 4)], "whole", (2,), groups=2),
        _gated_qkv(1, 2, 3, 2),
    ],
    ids=["rename", "split_rows", "concat_rows", "split_rows in groups", "concat_rows in groups", "gated_qkv"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_invertible_mapping_keeps_every_bit_pattern(mapping: TensorMapping, dtype: torch.dtype) -> None:
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
    mapping = zero_centred("w", "w-1", (4096,))
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
    mapping = zero_centred("w", "w-1", tuple(w.shape))
    (stored,) = mapping.to_megatron([w])
    assert stored.dtype == torch.float32
    assert torch.equal(stored.double(), w.double() - 1)
    assert torch.equal(mapping.to_hf([stored])[0].to(dtype).view(torch.int16), w.view(torch.int16))


class TestShards:
    """What a shard holds is told by its rows alone."""

    @pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
    @pytest.mark.parametrize(
        "mapping",
        [
            concat_rows([("q", 16), ("k", 8), ("v", 8)], "qkv", (3,), groups=2),  # at TP 4 and 8 a shard cuts a group
            _gated_qkv(2, 2, 4, 3),
            split_rows("qkvz", [("q", 8), ("k", 8), ("v", 16), ("z", 16)], (2,), groups=4),
            rename("a", "b", (8, 2)),
            shared(["embedding", "head"], "words", (8, 2)),
        ],
        ids=["concat_rows", "gated_qkv", "split_rows", "rename", "shared"],
    )
    def test_the_runs_of_all_shards_fill_the_hugging_face_tensors(
        self, mapping: TensorMapping, tensor_parallel: int
    ) -> None:
        whole = [torch.randn(spec.shape) for spec in mapping.megatron]
        expected = mapping.to_hf(whole)
        found = [torch.full(spec.shape, torch.nan) for spec in mapping.hf]
        for at, tensor in enumerate(whole):
            rows = tensor.shape[0] // tensor_parallel
            for rank in range(tensor_parallel):
                shard = tensor[rank * rows : (rank + 1) * rows]
                for run in mapping.runs_in_shard(at, rank * rows, (rank + 1) * rows):
                    assert run.megatron == at
                    target = found[run.hf][run.hf_start : run.hf_start + run.rows]
                    assert target.isnan().all()
                    target.copy_(shard[run.megatron_start : run.megatron_start + run.rows])
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

    def test_rows_that_no_run_has_are_in_no_shard(self) -> None:
        assert rename("a", "b", (8, 2)).runs_in_shard(0, 8, 12) == ()  # rows of padding


class TestRefuses:
    @pytest.mark.parametrize(
        ("runs", "message"),
        [
            ([(0, 0, 2)], "the runs have 2 rows, expected 3"),
            ([(0, 0, 2), (1, 2, 1)], "starts at row 1, expected row 2"),
            ([(0, 0, 2), (2, 1, 1)], "starts at row 1, expected row 2"),
            ([(0, 0, 4)], "the runs have 4 rows, expected 3"),
        ],
    )
    def test_runs_that_do_not_fill_a_tensor(self, runs: list[tuple[int, int, int]], message: str) -> None:
        spec = TensorSpec(name="a", shape=(3, 2))
        made = tuple(RowRun(hf=0, hf_start=a, megatron=0, megatron_start=b, rows=n) for a, b, n in runs)
        with pytest.raises(ValueError, match=message):
            TensorMapping(hf=(spec,), megatron=(spec,), runs=made)

    def test_a_tensor_or_a_rule_that_is_not_there(self) -> None:
        spec = TensorSpec(name="a", shape=(3, 2))
        run = RowRun(hf=0, hf_start=0, megatron=0, megatron_start=0, rows=3)
        with pytest.raises(ValueError, match="names a tensor that the mapping does not have"):
            TensorMapping(hf=(spec,), megatron=(spec,), runs=(run, dataclasses.replace(run, hf=1)))
        with pytest.raises(ValueError, match=r"rule must be one of \('same', 'transposed', 'minus_one'\), got 'other'"):
            TensorMapping(hf=(spec,), megatron=(spec,), runs=(run,), rule="other")  # type: ignore[arg-type]

    def test_copies_with_other_bits(self) -> None:
        mapping = shared(["a", "b"], "c", (2,))
        zero = torch.tensor([0.0, 1.0])
        assert mapping.to_megatron([zero, zero.clone()])[0] is zero
        with pytest.raises(
            ValueError, match=r"b and a have different values, but config\.json says that they are tied"
        ):
            mapping.to_megatron([zero, torch.tensor([-0.0, 1.0])])


def test_a_transposed_matrix_is_contiguous_on_both_sides() -> None:
    mapping, matrix = transposed("a", "b", (2, 3)), torch.arange(6).reshape(3, 2)
    (there,) = mapping.to_megatron([matrix])
    assert there.is_contiguous()
    assert torch.equal(there, matrix.t())
    (back,) = mapping.to_hf([there])
    assert back.is_contiguous()
    assert torch.equal(back, matrix)


def test_one_run_of_rows_is_not_copied() -> None:
    whole = torch.arange(12).reshape(6, 2)
    assert rename("a", "b", (6, 2)).to_megatron([whole])[0] is whole
    parts = split_rows("whole", [("first", 1), ("second", 5)], (2,)).to_megatron([whole])
    assert all(part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)
