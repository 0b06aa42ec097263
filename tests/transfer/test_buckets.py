"""Where tensors lie in buckets."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_fp32.transfer.buckets import plan_buckets
from megatron_fp32.weights.tensors import DTYPES, TensorInfo

INFOS = st.builds(
    lambda dtype, sizes: TensorInfo(dtype=DTYPES[dtype], shape=(*sizes, 2) if dtype == "F4" else tuple(sizes)),
    st.sampled_from(sorted(DTYPES)),
    st.lists(st.integers(0, 40), max_size=3),
)


@given(st.lists(INFOS, max_size=30), st.integers(0, 5000))
def test_every_tensor_has_a_place_of_its_own(infos: list[TensorInfo], bucket_bytes: int) -> None:
    tensors = {f"t{at}": info for at, info in enumerate(infos)}
    buckets = plan_buckets(tensors, bucket_bytes)
    assert [(place.name, place.info) for bucket in buckets for place in bucket.places] == list(tensors.items())
    for bucket in buckets:
        end = 0
        for place in bucket.places:
            assert place.start % 256 == 0
            assert place.start >= end
            end = place.start + place.info.nbytes
        assert end <= bucket.payload
        assert bucket.payload % 256 == 0
        assert bucket.nbytes == bucket.payload + 256
        assert len(bucket.places) == 1 or bucket.payload <= bucket_bytes


@given(st.lists(INFOS, max_size=30), st.integers(0, 5000))
def test_a_bucket_is_closed_only_where_the_next_tensor_does_not_fit(infos: list[TensorInfo], bucket_bytes: int) -> None:
    buckets = plan_buckets({f"t{at}": info for at, info in enumerate(infos)}, bucket_bytes)
    for one, other in itertools.pairwise(buckets):
        assert one.payload + -(-other.places[0].info.nbytes // 256) * 256 > bucket_bytes


@given(st.lists(INFOS, min_size=1, max_size=10))
def test_views_share_the_buffer_and_do_not_overlap(infos: list[TensorInfo]) -> None:
    (bucket,) = plan_buckets({f"t{at}": info for at, info in enumerate(infos)}, 1 << 30)
    buffer = torch.zeros(bucket.nbytes, dtype=torch.uint8)
    for place in bucket.places:
        view = place.view(buffer)
        assert (view.dtype, tuple(view.shape)) == (place.info.dtype, place.info.torch_shape)
        view.view(-1).view(torch.uint8).add_(1)
    payload, trailer = bucket.split(buffer)
    assert set(buffer.tolist()) <= {0, 1}
    assert int(payload.sum()) == sum(info.nbytes for info in infos)
    assert trailer.numel() == 8
    assert trailer.data_ptr() == buffer.data_ptr() + bucket.payload
