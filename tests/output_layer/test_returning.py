"""Results of the output layer out of Megatron's models, in place of logits, against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from torch import Tensor

from megatron_fp32.apply import apply_fp32
from megatron_fp32.config import Fp32Config
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.ops.logprobs import Logprobs
from megatron_fp32.output_layer.requests import (
    LogprobsRequest,
    SelectedLogprobsRequest,
    TopLogprobsRequest,
)
from megatron_fp32.results import returning
from tests.output_layer.layers import LENGTH, VOCAB, fill, gpt, inputs
from tests.output_layer.requested import (
    EXACT,
    FUSED,
    MODELS,
    REQUESTS,
    built,
    drawn,
    of_top,
    total_of,
    weight_of,
)

pytestmark = pytest.mark.usefixtures("megatron")


@pytest.mark.parametrize("config", [EXACT, FUSED], ids=["logits", "fused"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", REQUESTS)
def test_results_and_gradients(name: str, kind: str, config: Fp32Config) -> None:
    request, exact = REQUESTS[kind]()
    model, seen = built(name, config)
    batch = inputs()
    with returning(model, request):
        results = model(**batch)
    hidden, weight = seen[-1], weight_of(model)
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    expected = exact((x @ w.t()).transpose(0, 1), batch["labels"])
    for field, ours, value in zip(results._fields, results, expected, strict=True):
        assert ours.shape == value.shape
        assert ours.is_contiguous()
        assert relative_error(ours.detach().double(), value.detach().double()) < 1e-6, field
    grad_x, grad_w = torch.autograd.grad(total_of(expected), (x, w))
    # A tied weight has gradients from the embedding, too, and multi-token prediction adds its own.
    of_head = [hidden] if name in ("tied", "mtp") else [hidden, weight]
    found = torch.autograd.grad(total_of(results), of_head)
    # dX has been rounded to bf16 once; so has dW, which does not go into a main_grad here.
    for ours, value in zip(found, (grad_x, grad_w)[: len(of_head)], strict=True):
        assert relative_error(ours.double(), value) < 2.0**-8


@pytest.mark.parametrize("config", [EXACT, FUSED], ids=["logits", "fused"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_on_its_loss(name: str, config: Fp32Config) -> None:
    """Also the losses of multi-token prediction and their gradients are as without a request."""
    runs = []
    for wanted in (False, True):
        model, _ = built(name, config)
        if wanted:
            with returning(model, LogprobsRequest()):
                loss = -model(**inputs()).logprobs
        else:
            loss = model(**inputs())
        loss.sum().backward()
        tracked = {k: v for k, v in MTPLossLoggingHelper.tracker.items() if isinstance(v, Tensor)}
        assert bool(tracked) == (name == "mtp")
        grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        runs.append({"loss": loss.detach(), **tracked, **grads})
    assert runs[0].keys() == runs[1].keys()
    for key, value in runs[0].items():
        assert relative_error(runs[1][key], value) < (1e-6 if key == "loss" else 1e-2), key


@pytest.mark.parametrize("name", ["gpt", "hybrid"])
def test_a_model_without_labels(name: str) -> None:
    request, exact = of_top()
    model, seen = built(name)
    with returning(model, request):
        results = model(**inputs(labels=False))
    logits = (seen[-1].double() @ weight_of(model).double().t()).transpose(0, 1)
    for ours, value in zip(results, exact(logits, inputs()["labels"]), strict=True):
        assert relative_error(ours.detach().double(), value.detach().double()) < 1e-6


def test_an_ignored_label_and_a_masked_position_have_zeros() -> None:
    model, _ = built("gpt")
    batch, mask = inputs(), torch.ones(2, LENGTH, dtype=torch.bool)
    batch["labels"][1, 3], mask[1, 3] = -100, False
    tokens = drawn(VOCAB).argsort(-1)[..., :4]
    tokens[1, 3] = -100
    for request in (LogprobsRequest(), TopLogprobsRequest(k=2, mask=mask), SelectedLogprobsRequest(tokens=tokens)):
        with returning(model, request):
            results = model(**batch)
        for field in ("logprobs", "entropy", "logsumexp"):
            assert not getattr(results, field)[1, 3].any()
            assert getattr(results, field)[0, 3].all()


def test_float16module_makes_a_plain_tuple() -> None:
    model, _ = built("gpt")
    wrapped = Float16Module(model.config, model)
    with returning(wrapped, LogprobsRequest(top_k=2)):
        out = wrapped(**inputs())
        named = model(**inputs())
    assert isinstance(named, Logprobs)
    assert torch.equal(Logprobs(*out).top_logprobs, named.top_logprobs)  # type: ignore[arg-type]


def test_mup() -> None:
    class Scaled(GPTModel):  # type: ignore[misc]
        def _postprocess(self, hidden_states: Tensor, labels: Tensor, **others: Any) -> Any:
            logits = 0.5 * self.output_layer(hidden_states)[0] * 0.5
            return self.compute_language_model_loss(labels, logits)

    model, seen = built("gpt")
    model.__class__ = Scaled
    batch = inputs()
    with returning(model, LogprobsRequest()):
        out = model(**batch)
    exact = (seen[0].double() @ weight_of(model).double().t() * 0.25).log_softmax(-1).transpose(0, 1)
    assert relative_error(out.logprobs.detach(), exact.gather(2, batch["labels"][..., None])[..., 0]) < 1e-6


@pytest.mark.parametrize("mtp", [None, 1], ids=["plain", "mtp"])
@pytest.mark.parametrize("config", [EXACT, FUSED], ids=["logits", "fused"])
def test_packed_sequences(mtp: int | None, config: Fp32Config) -> None:
    """Each token of a pack has what it has in a batch with its sequence alone."""
    MTPLossLoggingHelper.tracker = {}
    model = gpt(attention=False, mtp=mtp)
    fill(model)
    apply_fp32(model, config, weights="initialized")
    bounds = torch.tensor([0, 5, 6, LENGTH], dtype=torch.int32)
    pack = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=10, max_seqlen_kv=10
    )
    batch = {key: value[:1] for key, value in inputs().items()}
    for end in bounds[1:]:
        batch["labels"][0, end - 1] = -100
    with returning(model, LogprobsRequest(top_k=2)):
        whole = model(**batch, packed_seq_params=pack)
        loss_of_whole = whole.logprobs
        alone = [
            model(**{key: x[:, a:b] for key, x in batch.items() if key != "attention_mask"}, attention_mask=None)
            for a, b in itertools.pairwise(bounds)
        ]
    for field in ("logprobs", "entropy", "logsumexp", "top_logprobs"):
        pieces = torch.cat([getattr(results, field) for results in alone], 1)
        assert relative_error(getattr(whole, field).detach(), pieces.detach()) < 1e-6
    assert not loss_of_whole[0, bounds[1:].long() - 1].any()
    if config is FUSED:
        assert torch.equal(model(**batch, packed_seq_params=pack), -loss_of_whole)
