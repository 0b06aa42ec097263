"""The sharp edges of an output layer with fp32 logits, on one rank: one test each, named for what it guards.

Numbers are those of one list for the package. 4, 5, 6, 11, 12 and 29 are in test_weight_gradient.py (12 goes on in
test_deferred.py); 9, 13, 14 and 15 in test_ranks.py; 27 and 30 in tests/test_apply.py. 21 needs a GPU (tests/gpu), and
tests/ops has the plain operator's.
"""

from __future__ import annotations

import copy
import math
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as stock_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from megatron_fp32.config import Fp32Config
from megatron_fp32.ops.logits.reference import gradients_reference, logits_reference, relative_error
from megatron_fp32.output_layer import layer as output_layer
from megatron_fp32.output_layer.cross_entropy import vocab_parallel_cross_entropy
from megatron_fp32.output_layer.layer import Fp32OutputLayer, to_fp32_output_layer
from tests.output_layer.layers import HIDDEN, VOCAB, head, integers, micro_batch, stock_layer

pytestmark = pytest.mark.usefixtures("megatron")


class TestLogits:
    """What comes out, and what others do to it."""

    def test_01_logits_of_batch_one_may_be_divided_in_place(self) -> None:
        layer = head()
        hidden, grad = micro_batch((6, 1))
        logits, _ = layer(hidden)
        logits.transpose(0, 1).contiguous().div_(0.5).backward(grad.transpose(0, 1))
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), grad * 2)
        assert torch.equal(hidden.grad, truth.hidden_grad.bfloat16())

    def test_02_a_caller_who_needs_the_logits_after_the_loss_has_them(self) -> None:
        layer = head()
        hidden, _ = micro_batch()
        target = torch.randint(VOCAB, (6, 2))
        logits, _ = layer(hidden)
        before = logits.detach().clone()
        loss = vocab_parallel_cross_entropy(logits, target)
        assert torch.equal(logits, before)
        entropy = torch.distributions.Categorical(logits=logits).entropy()
        (loss.sum() + entropy.sum()).backward()
        assert hidden.grad.isfinite().all()
        expected = torch.nn.functional.cross_entropy(before.flatten(0, 1).double(), target.flatten(), reduction="none")
        assert torch.allclose(loss.flatten().double(), expected, rtol=1e-6, atol=1e-5)

    def test_02_the_stock_loss_destroys_the_logits_but_not_the_gradients(self) -> None:
        layer = head()
        hidden, _ = micro_batch()
        target = torch.randint(VOCAB, (6, 2))
        logits, _ = layer(hidden)
        before = logits.detach().clone()
        stock_cross_entropy(logits, target).sum().backward()
        assert not torch.equal(logits, before)
        grad = before.softmax(-1) - torch.nn.functional.one_hot(target, VOCAB)
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), grad)
        stock = gradients_reference(hidden.detach(), layer.weight.detach(), grad.bfloat16())
        error = relative_error(stock.weight_grad, truth.weight_grad)
        assert relative_error(layer.weight.main_grad, truth.weight_grad) <= 1.1 * error

    def test_03_a_gradient_may_share_the_memory_of_the_logits(self) -> None:
        layer = head()
        hidden, grad = micro_batch()
        logits, _ = layer(hidden)
        logits.detach().copy_(grad)
        logits.backward(logits.detach())
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), grad)
        assert torch.equal(hidden.grad, truth.hidden_grad.bfloat16())
        assert torch.equal(logits, grad)

    def test_17_fp16_logits_beyond_fp16_are_finite_and_an_overflowing_gradient_shows(self) -> None:
        layer = head()
        layer.half()
        hidden, grad = micro_batch()
        big = (hidden.detach().half() * 2000).requires_grad_()
        logits, _ = layer(big)
        assert logits.isfinite().all()
        assert logits.abs().max() > 65504
        # Under a loss scale that is too large the step must be skipped, so infinity has to arrive.
        logits.backward(grad * 1e6)
        assert not big.grad.isfinite().all()
        assert not layer.weight.main_grad.isfinite().all()

    @pytest.mark.parametrize("precision", ["bf16", "bf16x2", "bf16x3"])
    def test_18_an_fp32_residual_stream_is_not_rounded(self, precision: Any) -> None:
        layer = head(Fp32Config(grad_precision=precision))
        hidden, grad = torch.randn(6, 2, HIDDEN, requires_grad=True), torch.randn(6, 2, VOCAB)
        logits, _ = layer(hidden)
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), grad)
        wide = (hidden.detach() @ layer.weight.detach().float().t(), grad @ layer.weight.detach().float())
        assert relative_error(logits, truth.logits) <= 3 * relative_error(wide[0], truth.logits)
        logits.backward(grad)
        assert hidden.grad.dtype == torch.float32
        bits = {"bf16": 8, "bf16x2": 16, "bf16x3": 21}[precision]
        assert relative_error(hidden.grad, truth.hidden_grad) <= 2.0**-bits
        assert relative_error(layer.weight.main_grad, truth.weight_grad) <= 2 * 2.0**-bits

    def test_23_no_token_one_token_and_slices(self) -> None:
        layer = head()
        whole, _ = micro_batch((6, 2))
        for hidden in (whole[:0], whole[-1:], whole[:1, :1], whole.transpose(0, 1), whole[::2]):
            logits, _ = layer(hidden)
            assert torch.equal(logits.double(), logits_reference(hidden, layer.weight))
            logits.sum().backward()

    def test_24_padded_columns_can_be_masked(self) -> None:
        layer = head()
        hidden, _ = micro_batch()
        logits, _ = layer(hidden)
        logits[..., VOCAB - 6 :] = -math.inf
        logprobs = logits.log_softmax(-1)
        logprobs[..., 0].sum().backward()
        assert hidden.grad.isfinite().all()
        assert layer.weight.main_grad.isfinite().all()
        assert not layer.weight.main_grad[VOCAB - 6 :].any()

    def test_25_bias_is_added_in_fp32_and_its_gradient_summed_in_fp32(self) -> None:
        layer = head(bias=True)
        with torch.no_grad():
            layer.bias.copy_(integers(VOCAB) / 512)
        hidden, grad = micro_batch()
        logits, bias = layer(hidden)
        assert bias is None
        logits.backward(grad)
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), grad, layer.bias.detach())
        assert torch.equal(logits.double(), truth.logits)
        assert torch.equal(layer.bias.grad, truth.bias_grad.bfloat16())

    def test_26_a_soft_cap_sees_fp32_logits(self) -> None:
        class Capped(ColumnParallelLinear):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                output, bias = super().forward(*args, **kwargs)
                return 30 * torch.tanh(output / 30), bias

        layer = to_fp32_output_layer(stock_layer(Capped))
        assert type(layer).__name__ == "Capped"
        assert isinstance(layer, Capped)
        hidden = torch.randn(6, 2, HIDDEN).bfloat16()
        capped, _ = layer(hidden)
        plain = logits_reference(hidden, layer.weight)
        assert relative_error(capped, 30 * torch.tanh(plain / 30)) < 1e-6
        assert layer.fp32_calls == 1
        again = pickle.loads(pickle.dumps(to_fp32_output_layer(stock_layer())))
        assert isinstance(again, Fp32OutputLayer)


class TestSurroundings:
    def test_07_a_compiled_layer_computes_the_same_bits(self) -> None:
        torch._dynamo.reset()
        layer = head()
        hidden, grad = micro_batch()
        compiled = torch.compile(lambda x: layer(x * 2)[0] / 3, backend="aot_eager")
        results = []
        # Tests run under a stance that ignores torch.compile.
        with torch.compiler.set_stance("default"):
            for run in (compiled, lambda x: layer(x * 2)[0] / 3):
                layer.weight.main_grad.zero_()
                logits = run(hidden)
                (hidden_grad,) = torch.autograd.grad(logits, hidden, grad)
                results.append((logits, hidden_grad, layer.weight.main_grad.clone()))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_07_counting_passes_does_not_compile_anew(self) -> None:
        torch._dynamo.reset()
        layer = to_fp32_output_layer(stock_layer())
        counter = CompileCounter()
        with torch.compiler.set_stance("default"):
            compiled = torch.compile(layer, backend=counter)
            for _ in range(6):
                compiled(integers(2, 1, HIDDEN))
        assert layer.fp32_calls == 1
        assert counter.frame_count <= 2

    @pytest.mark.parametrize("fails", [False, True])
    def test_08_precision_settings_are_as_before_afterwards(self, fails: bool) -> None:
        layer = head()
        hidden, grad = micro_batch()
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium")
        try:
            settings = torch.backends.mkldnn.matmul.fp32_precision
            if fails:
                with pytest.raises(TypeError, match="must both be"):
                    layer(hidden.double())
            else:
                layer(hidden)[0].backward(grad)
            assert torch.backends.mkldnn.matmul.fp32_precision == settings
            assert torch.get_float32_matmul_precision() == "medium"
        finally:
            torch.set_float32_matmul_precision(before)

    def test_10_autocast_around_forward_or_backward_changes_no_bit(self) -> None:
        results = []
        for inside in (False, True):
            torch.manual_seed(1)
            layer = head()
            hidden, grad = micro_batch()
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                logits, _ = layer(hidden)
                logits.backward(grad / 3)
            results.append((logits, hidden.grad, layer.weight.main_grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    def test_13_sequence_parallel_may_be_switched_off_for_a_call(self) -> None:
        layer = head()
        hidden, _ = micro_batch()
        for flag in (False, True, False):  # inference with dynamic batches does this
            layer.sequence_parallel = flag
            logits, _ = layer(hidden)
            assert torch.equal(logits.double(), logits_reference(hidden, layer.weight))

    def test_20_deterministic_algorithms_are_no_obstacle(self) -> None:
        layer = head()
        hidden, grad = micro_batch()
        before = torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            layer(hidden)[0].backward(grad)
        finally:
            torch.use_deterministic_algorithms(True, warn_only=before)
        assert layer.weight.main_grad.any()

    def test_22_recomputed_activations_and_offloaded_tensors(self) -> None:
        layer = head()
        hidden, grad = micro_batch()
        truth = gradients_reference(hidden.detach(), layer.weight.detach(), grad)
        logits = checkpoint(lambda x: layer(x * 1)[0], hidden, use_reentrant=False)
        logits.backward(grad)
        assert torch.equal(layer.weight.main_grad.double(), truth.weight_grad)
        assert torch.equal(hidden.grad, truth.hidden_grad.bfloat16())
        # Offloading gives back a copy, which has no main_grad: dW must still find its way.
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
            logits, _ = layer(hidden)
        logits.backward(grad)
        assert torch.equal(layer.weight.main_grad.double(), 2 * truth.weight_grad)

    def test_30_conversion_is_idempotent(self) -> None:
        layer = head()
        assert to_fp32_output_layer(layer) is layer
        assert type(layer) is Fp32OutputLayer

    def test_31_a_layer_can_be_copied_and_pickled(self) -> None:
        layer = head()
        for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(again) is Fp32OutputLayer
            assert again.tp_group is layer.tp_group
            assert torch.equal(again.weight, layer.weight)
            assert again.weight is not layer.weight
            hidden, _ = micro_batch()
            assert torch.equal(again(hidden)[0], layer(hidden)[0])
            again.load_state_dict({"weight": layer.weight})  # _extra_state may be absent

    def test_31_what_was_mixed_in_after_the_conversion_is_not_lost_in_a_pickle(self) -> None:
        layer = head()
        layer.__class__ = type("Late", (type(layer),), {})
        with pytest.raises(ValueError, match="was made after the fp32 conversion and cannot be pickled"):
            pickle.dumps(layer)


class TestRefusals:
    def test_16_a_weight_that_gtp_shards(self) -> None:
        layer = stock_layer()
        layer.gtp_remat_size = 2
        with pytest.raises(ValueError, match=r"GTP-sharded weight \(gtp_remat_size=2\)"):
            to_fp32_output_layer(layer)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [({"cuda_graph_impl": "local"}, "CUDA graphs"), ({"pipeline_model_parallel_size": 2}, "pipeline parallelism")],
    )
    def test_19_an_inference_engine_that_would_round_the_logits(
        self, fields: dict[str, Any], message: str, monkeypatch: Any
    ) -> None:
        layer = head()
        vars(layer.config).update(fields)
        layer(integers(2, 1, HIDDEN))
        monkeypatch.setattr(output_layer, "InferenceMode", SimpleNamespace(is_active=lambda: True))
        with pytest.raises(ValueError, match=f"rounds logits to torch.bfloat16 under {message}"):
            layer(integers(2, 1, HIDDEN))

    def test_20_batch_invariant_mode(self) -> None:
        layer = stock_layer()
        layer.config.batch_invariant_mode = True
        with pytest.raises(ValueError, match=r"batch_invariant_mode needs Fp32Config\(invariant=True\)"):
            to_fp32_output_layer(layer)
        fp32 = to_fp32_output_layer(layer, Fp32Config(invariant=True))
        hidden = torch.randn(70, 1, HIDDEN).bfloat16()
        whole, _ = fp32(hidden)
        for count in (1, 2, 7):
            assert torch.equal(fp32(hidden[:count])[0], whole[:count])

    def test_28_a_fused_linear_cross_entropy_would_bypass_the_layer(self) -> None:
        layer = stock_layer()
        layer.config.cross_entropy_loss_fusion = True
        layer.config.cross_entropy_fusion_impl = "linear"
        with pytest.raises(ValueError, match="'linear' computes the loss without the output layer's logits"):
            to_fp32_output_layer(layer)

    def test_28_a_fused_cross_entropy_that_rounds_the_gradient(self) -> None:
        layer = stock_layer()
        layer.config.cross_entropy_loss_fusion = True
        to_fp32_output_layer(layer)
        with pytest.raises(ValueError, match=r"'native' rounds dY to bf16 before .*'bf16x3' would have no effect"):
            to_fp32_output_layer(layer, Fp32Config(grad_precision="bf16x3"))
