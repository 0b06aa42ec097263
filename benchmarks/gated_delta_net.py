"""Time of a gated-delta-net layer with fp32 `A_log` and `out_norm`, compared with megatron-core's layer.

    python benchmarks/gated_delta_net.py [--tokens 4096 --tokens 32768] [--json FILE]

Needs a CUDA device, Transformer Engine and flash-linear-attention, which tunes its kernels for minutes before the first
row. It times forward and backward of one layer with Qwen3.5's shape (hidden 2048, 16 key and 32 value heads of 128).
The stock layer and the fp32 layer have equal weights and take turns within one run. `error` is the error of the timed
output against a layer with all parameters and activations in fp32.
"""

from __future__ import annotations

import functools
import json
import platform
import sys
from pathlib import Path
from typing import Any

import click
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from timing import take_turns
from torch import Tensor

from megatron_fp32.config import Fp32Config
from megatron_fp32.models.provider import transformer_config
from megatron_fp32.models.specs import decoder_block_spec
from megatron_fp32.ops.logits.reference import relative_error
from megatron_fp32.testing.cpu import model_parallel, single_process
from megatron_fp32.weights.families.qwen3_5 import Qwen35Config

MODEL = Qwen35Config(
    vocab_size=1024,
    hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=16,
    num_key_value_heads=2,
    head_dim=256,
    linear_num_key_heads=16,
    linear_num_value_heads=32,
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_conv_kernel_dim=4,
    layer_types=("linear_attention",),
    rms_norm_eps=1e-6,
    rope_theta=1e7,
    partial_rotary_factor=0.25,
    tie_word_embeddings=False,
)


@click.command()
@click.option("--tokens", multiple=True, type=int, default=(4096, 32768), show_default=True)
@click.option("--repeats", default=30, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(tokens: tuple[int, ...], repeats: int, json_path: Path | None) -> None:
    rows: list[dict[str, Any]] = []
    with single_process("nccl"), model_parallel():
        for spec in ("transformer_engine", "local"):
            layers = same_weights(spec)
            for count in tokens:
                rows += measure(layers, count, repeats, spec)
    for row in rows:
        print(
            f"{row['spec']:20} {row['tokens']:6} tokens  {row['layer']:5}  {row['ms']:8.3f} ms  {row['ratio']:.3f}x  "
            f"error {row['error']:.2e}"
        )
    if json_path is not None:
        machine = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        }
        json_path.write_text(json.dumps({"command": " ".join(sys.argv), **machine, "rows": rows}, indent=1) + "\n")


def same_weights(spec: str) -> dict[str, torch.nn.Module]:
    """The stock layer, `Fp32GatedDeltaNet`, and a layer with fp32 everywhere, with weights equal up to rounding."""
    truth = build(spec, Fp32Config(gated_delta_net=()), torch.float32)
    layers = {"stock": build(spec, Fp32Config(gated_delta_net=())), "fp32": build(spec, Fp32Config())}
    with torch.no_grad():
        for name, parameter in truth.named_parameters():
            # Only A_log and out_norm have bits that bf16 cannot hold, as in the released checkpoints.
            if not name.endswith(("A_log", "out_norm.weight")):
                parameter.copy_(parameter.bfloat16())
            elif name.endswith("out_norm.weight"):
                parameter.copy_(0.3 * torch.randn_like(parameter))
            for layer in layers.values():
                layer.get_parameter(name).copy_(parameter)
    return {**layers, "truth": truth}


def build(spec: str, fp32: Fp32Config, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """One gated-delta-net layer, cast as Float16Module would."""
    config = transformer_config(
        MODEL,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        transformer_impl=spec,
        persist_layer_norm=False,
        # flash-linear-attention does not support fp32. In this mode megatron-core uses torch operators.
        deterministic_mode=dtype == torch.float32,
    )
    attention = decoder_block_spec(config, fp32).layer_specs[0].submodules.self_attention
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(attention, config=config, layer_number=1, pg_collection=groups).cuda().to(dtype)


def measure(layers: dict[str, torch.nn.Module], tokens: int, repeats: int, spec: str) -> list[dict[str, Any]]:
    """Median milliseconds of forward and backward of each layer. The layers take turns."""
    # Compiled code of other rows is dropped, because a training process has one shape and one kind of layer.
    torch._dynamo.reset()
    hidden = torch.randn(tokens, 1, MODEL.hidden_size, device="cuda").bfloat16().requires_grad_()
    cotangent = torch.randn_like(hidden)

    def step(layer: torch.nn.Module) -> Tensor:
        output: Tensor = layer(hidden, None)[0]
        output.backward(cotangent)
        return output

    ways = {name: functools.partial(step, layers[name]) for name in ("stock", "fp32")}
    found = take_turns(ways, repeats=repeats, warm_ups=5, swap=True)
    with torch.no_grad():
        truth = layers["truth"](hidden.float(), None)[0]
    return [
        {
            "spec": spec,
            "tokens": tokens,
            "layer": name,
            "ms": timing.ms,
            "ratio": timing.ms / found["stock"].ms,
            "error": relative_error(timing.output.detach(), truth),
        }
        for name, timing in found.items()
    ]


if __name__ == "__main__":
    main()
