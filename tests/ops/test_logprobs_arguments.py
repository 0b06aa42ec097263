"""What the operators without logits refuse, and how they cut their work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, distribute_tensor

from megatron_fp32.ops.logprobs import linear_cross_entropy, linear_logprobs, weighted_cross_entropy, workspace
from megatron_fp32.testing.cpu import single_process
from tests.ops.logprobs_cases import TOKENS, case, grouped


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"vocab_size": 701}, "vocab_size must be 1 to 700"),
            ({"vocab_size": 0}, "vocab_size must be at least 1"),
            ({"temperature": 0.0}, "temperature must be positive"),
            ({"temperature": -1.0}, "temperature must be positive"),
            ({"temperature": math.inf}, "temperature must be positive and finite"),
            ({"temperature": math.nan}, "temperature must be positive and finite"),
            ({"scale": math.nan}, "scale must be finite"),
            ({"softcap": math.inf}, "softcap must be positive and finite"),
            ({"top_k": -1}, "top_k must be at least 0"),
            ({"temperature": torch.ones(3)}, "labels' shape"),
            ({"softcap": 0.0}, "softcap must be positive"),
            ({"chunk_size": 0}, "chunk_size must be at least 1"),
            ({"backward": "never"}, "backward must be one of"),
            ({"grad_precision": "fp8"}, "grad_precision must be one of"),
            ({"labels": torch.zeros(3, dtype=torch.long)}, r"expected labels \(150,\)"),
            ({"hidden": torch.zeros(TOKENS, 3).bfloat16()}, "expected hidden"),
        ],
    )
    def test_values(self, changes: dict[str, Any], message: str) -> None:
        c = case()
        arguments = {"hidden": c.hidden, "weight": c.weight, "labels": c.labels} | changes
        with pytest.raises(ValueError, match=message):
            linear_logprobs(**grouped(arguments))

    def test_types(self) -> None:
        c = case()
        with pytest.raises(TypeError, match="labels must be int64 or int32"):
            linear_logprobs(c.hidden, c.weight, c.labels.float())
        with pytest.raises(TypeError, match="hidden and weight must both be"):
            linear_logprobs(c.hidden.half(), c.weight, c.labels)
        wrong: dict[str, Any] = {
            "temperature": "1", "scale": None, "softcap": True, "top_k": 2.0, "chunk_size": 8.0, "vocab_size": 5.0,
            "group": 2,
        }  # fmt: skip
        for name, value in wrong.items():
            with pytest.raises(TypeError, match=f"{name} must be"):
                linear_logprobs(c.hidden, c.weight, c.labels, **grouped({name: value}))

    @pytest.mark.parametrize("operator", [linear_logprobs, linear_cross_entropy, weighted_cross_entropy])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"vocab_parallel": 650}, "vocab_parallel must be a VocabParallel or None, got 650"),
            ({"logits_transform": 5.0}, r"logits_transform must be a LogitsTransform or None, got 5\.0"),
        ],
    )
    def test_a_value_instead_of_a_group_of_options(
        self, operator: Any, arguments: dict[str, Any], message: str
    ) -> None:
        c = case()
        extra = (torch.ones(TOKENS),) if operator is weighted_cross_entropy else ()
        with pytest.raises(TypeError, match=message):
            operator(c.hidden, c.weight, c.labels, *extra, **arguments)

    @pytest.mark.parametrize("name", ["hidden", "weight", "labels", "temperature", "loss_weights"])
    def test_dtensors(self, name: str) -> None:
        c = case(torch.float32)
        arguments = {"hidden": c.hidden, "weight": c.weight, "labels": c.labels, "temperature": torch.ones(TOKENS)}
        arguments["loss_weights"] = torch.ones(TOKENS)
        with single_process():
            mesh = DeviceMesh("cpu", [0])
            arguments[name] = distribute_tensor(arguments[name].detach(), mesh, [Replicate()])
            with pytest.raises(TypeError, match=f"{name} must be a plain tensor, with the process group"):
                weighted_cross_entropy(**arguments)
            if name != "loss_weights":
                del arguments["loss_weights"]
                for operator in (linear_logprobs, linear_cross_entropy):
                    with pytest.raises(TypeError, match=f"{name} must be a plain tensor"):
                        operator(**arguments)

    def test_invariance_that_cannot_be_kept(self) -> None:
        c = case(torch.float32)
        with pytest.raises(ValueError, match="invariant=True cannot be kept here: hidden and weight must both be bf"):
            linear_logprobs(c.hidden, c.weight, c.labels, invariant=True)


def test_ranks_cut_alike_whatever_memory_they_have() -> None:
    """Asked of a CUDA device that is not there: the answer must not look at one."""
    assert workspace.workspace_bytes(torch.device("cuda", 7), parallel=True) == workspace.BYTES
    assert workspace.workspace_bytes(torch.device("cpu"), parallel=False) == workspace.BYTES


def test_deterministic_algorithms_cut_alike_in_every_run() -> None:
    torch.use_deterministic_algorithms(True)
    try:
        assert workspace.workspace_bytes(torch.device("cuda", 7), parallel=False) == workspace.BYTES
    finally:
        torch.use_deterministic_algorithms(False)
