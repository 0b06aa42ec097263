"""The most probable tokens of the head without logits, and the memory that they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import linear_logprobs, workspace
from megatron_fp32.ops.logprobs.topk import bytes_of_a_token
from tests.ops.live_bytes import LiveBytes
from tests.ops.logprobs_cases import BENT, PADDED, TOKENS, VOCAB, case, grouped

FP32 = 1e-6


class TestTopK:
    @pytest.mark.parametrize("chunk_size", [None, 64])
    @pytest.mark.parametrize("backward", ["recompute", "saved"])
    @pytest.mark.parametrize("k", [1, 5, 200, VOCAB])
    def test_the_most_probable_tokens(self, k: int, backward: Any, chunk_size: int | None) -> None:
        c = case()
        out = linear_logprobs(
            c.hidden, c.weight, c.labels, top_k=k, backward=backward, chunk_size=chunk_size, **grouped(BENT)
        )
        truth, dx, _ = c.truth([torch.ones(TOKENS)], **BENT)
        exact = truth.logits.log_softmax(1)
        values, _ = exact.topk(k, 1)
        assert out.top_logprobs is not None
        assert out.top_tokens is not None
        known = c.labels >= 0
        assert relative_error(out.top_logprobs[known], values[known]) < FP32
        assert relative_error(out.top_logprobs[known], exact[known].gather(1, out.top_tokens[known])) < FP32
        assert all(len(set(row)) == k for row in out.top_tokens[known].tolist())
        assert not out.top_logprobs.requires_grad
        out.logprobs.sum().backward()
        assert relative_error(c.hidden.grad, dx) < 6e-3

    def test_the_label_itself_is_one_of_them(self) -> None:
        c = case()
        known = c.labels >= 0
        x = torch.where(known[:, None], 30 * c.weight.detach()[c.labels.clamp(min=0)].float(), 0.0).bfloat16()
        out = linear_logprobs(x, c.weight, c.labels, top_k=2, vocab_parallel=PADDED)
        assert out.top_tokens is not None
        assert torch.equal(out.top_tokens[known, 0], c.labels[known])

    def test_of_equals_the_smaller_index(self) -> None:
        out = linear_logprobs(torch.zeros(2, 8), torch.randn(500, 8), torch.zeros(2, dtype=torch.long), top_k=3)
        assert out.top_tokens.tolist() == [[0, 1, 2]] * 2

    @pytest.mark.parametrize(("vocab", "k"), [(4000, 3), (4000, 4000), (40000, 10)])
    def test_memory_for_a_token(self, vocab: int, k: int) -> None:
        """What the chunks are cut by is what the candidates take."""
        w = torch.randn(vocab, 8)

        def peak(tokens: int) -> int:
            x, y = torch.randn(tokens, 8), torch.zeros(tokens, dtype=torch.long)
            with LiveBytes() as live:
                linear_logprobs(x, w, y, top_k=k)
            return live.peak

        # Results, too, have 12 bytes for each of the k tokens, twice.
        of_a_token = (peak(128) - peak(64)) / 64 - 24 * k
        assert of_a_token < bytes_of_a_token(vocab, k) < 4 * of_a_token

    def test_chunks_for_many_candidates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tokens, vocab, k = 48, 6000, 2000
        monkeypatch.setattr(workspace, "BYTES", 2**21)
        x, w = torch.randn(tokens, 32).bfloat16(), torch.randn(vocab, 32).bfloat16()
        y = torch.zeros(tokens, dtype=torch.long)
        with LiveBytes() as few:
            linear_logprobs(x, w, y, top_k=1)
        with LiveBytes() as many:
            linear_logprobs(x, w, y, top_k=k)
        results = tokens * k * 24
        assert many.peak < few.peak + results + workspace.BYTES

    def test_more_than_there_are(self) -> None:
        c = case()
        with pytest.raises(ValueError, match="top_k must be 0 to 650"):
            linear_logprobs(c.hidden, c.weight, c.labels, top_k=651, vocab_parallel=PADDED)
