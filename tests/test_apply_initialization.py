"""Which values the kept parameters have after `apply_fp32`: drawn again, or as they were loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

from megatron_fp32.apply import apply_fp32, pre_wrap_hook
from megatron_fp32.config import Fp32Config
from megatron_fp32.kept_parameters.keep_in_fp32 import kept_parameters
from megatron_fp32.models.provider import build_model, cpu_overrides, transformer_config
from tests.qwen3_5 import tiny_qwen3_5
from tests.support import STOCK, stock_model

pytestmark = pytest.mark.usefixtures("megatron")

A_LOG = "decoder.layers.0.self_attention.A_log"

OUT_NORM = "decoder.layers.0.self_attention.out_norm.weight"


class TestInitialization:
    def on_grid(self, model: Any) -> bool:
        values = model.get_parameter(A_LOG)
        return torch.equal(values.bfloat16().float(), values)

    def test_a_log_is_drawn_again_where_megatron_drew_it_in_bf16(self) -> None:
        model = stock_model()
        report = apply_fp32(model, weights="initialized")
        assert not self.on_grid(model)
        low, high = model.decoder.layers[0].self_attention.A_init_range
        values = model.get_parameter(A_LOG).exp()
        assert ((values >= low) & (values <= high)).all()
        assert [p.redrawn for p in report.parameters] == [True, False]
        assert report.rounded == (OUT_NORM,)
        assert "1 of them drawn again" in str(report)
        assert OUT_NORM in str(report)

    @pytest.mark.parametrize("how", ["perform_initialization", "weights"])
    def test_what_was_loaded_is_left_as_it_is_and_reported(self, how: str) -> None:
        model = stock_model(perform_initialization=how != "perform_initialization")
        loaded = torch.tensor([0.5, 1.25, 2.0, 0.75]).bfloat16()
        with torch.no_grad():
            model.get_parameter(A_LOG).copy_(loaded)
        report = apply_fp32(model, weights="loaded" if how == "weights" else "initialized")
        assert torch.equal(model.get_parameter(A_LOG), loaded.float())
        assert A_LOG in report.rounded

    @pytest.mark.parametrize("call", [apply_fp32, lambda _, **given: pre_wrap_hook(**given)])
    def test_the_caller_says_where_the_weights_come_from(self, call: Any) -> None:
        model = stock_model()
        with pytest.raises(TypeError, match="weights"):
            call(model)
        for wrong in ("load", True, None):
            with pytest.raises(ValueError, match=f"weights must be 'initialized' .* or 'loaded' .*, got {wrong!r}"):
                call(model, weights=wrong)
        assert not list(kept_parameters(model))

    @pytest.mark.parametrize("mtp", [0, 1])
    def test_a_model_of_ours_starts_as_stock_at_the_same_seed(self, mtp: int) -> None:
        shapes = tiny_qwen3_5(layer_types=("linear_attention", "linear_attention", "full_attention"))
        overrides: dict[str, Any] = {"mtp_num_layers": 1} if mtp else {}
        config = transformer_config(shapes, **cpu_overrides(), bf16=True, params_dtype=torch.bfloat16, **overrides)
        models = []
        for fp32 in (STOCK, Fp32Config()):
            torch.manual_seed(5)
            model_parallel_cuda_manual_seed(5)
            models.append(dict(build_model(shapes, config, fp32, vocab_divisible_by=8).named_parameters()))
        stock, ours = models
        assert stock.keys() == ours.keys()
        different = {name for name in stock if not torch.equal(stock[name].float(), ours[name].float())}
        assert different == {f"decoder.layers.{i}.self_attention.A_log" for i in (0, 1)}

    def test_a_vocabulary_larger_than_the_head_is_refused(self) -> None:
        model = stock_model()
        rows = model.output_layer.output_size
        with pytest.raises(ValueError, match=rf"vocab_size={rows + 1}\) .* has only {rows} rows"):
            apply_fp32(model, Fp32Config(vocab_size=rows + 1), weights="initialized")
        assert not list(kept_parameters(model))
        apply_fp32(model, Fp32Config(vocab_size=rows), weights="initialized")

    def test_chunks_that_are_built_after_a_converted_one_start_as_stock_ones(self) -> None:
        """A model provider that converts what it returns is called once for each virtual stage."""

        def chunks(*, convert: bool) -> list[Any]:
            torch.manual_seed(5)
            model_parallel_cuda_manual_seed(5)
            built = []
            for _ in range(2):
                built.append(stock_model(model={"layer_types": ("linear_attention",) * 2}))
                if convert:
                    apply_fp32(built[-1], weights="initialized")
            return [dict(chunk.named_parameters()) for chunk in built]

        a_logs = set()
        for ours, again, stock in zip(chunks(convert=True), chunks(convert=True), chunks(convert=False), strict=True):
            for name, parameter in stock.items():
                assert torch.equal(ours[name], again[name]), name
                if name.endswith("A_log"):
                    a_logs.add(tuple(ours[name].tolist()))
                else:
                    assert torch.equal(ours[name].to(parameter.dtype), parameter), name
        assert len(a_logs) == 4  # each layer of each chunk has its own

    def test_the_tracker_is_as_it_was(self) -> None:
        model = stock_model()
        before = {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
        apply_fp32(model, weights="initialized")
        assert before
        for name, state in get_cuda_rng_tracker().get_states().items():
            assert torch.equal(state, before[name]), name

    def test_the_default_generator_is_as_it_was(self) -> None:
        state = torch.get_rng_state()
        apply_fp32(stock_model(), weights="initialized")
        before = torch.get_rng_state()
        torch.set_rng_state(state)
        stock_model()
        assert torch.equal(torch.get_rng_state(), before)  # the default generator was not touched by the second draw

    def test_on_the_meta_device_nothing_is_drawn(self) -> None:
        with torch.device("meta"):
            model = stock_model()
        model.to("meta")
        report = apply_fp32(model, weights="initialized")
        assert [(p.on_bf16_grid, p.redrawn) for p in report.parameters] == [(None, False)] * 2
