"""Time of a gated-delta-net layer with fp32 `A_log` and `out_norm`, beside the stock layer.

    python benchmarks/gated_delta_net.py [--tokens 4096] [--json FILE]

Needs a CUDA device, Transformer Engine and flash-linear-attention. Forward and backward of one layer of Qwen3.5's
shape (hidden 2048, 16 key and 32 value heads of 128), alternating the two layers within one run.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
from pathlib import Path

import click
import torch

from megatron_fp32.config import Fp32Config
from megatron_fp32.models.provider import transformer_config
from megatron_fp32.models.qwen3_5 import Qwen35Config
from megatron_fp32.models.specs import gated_delta_net_block_spec
from megatron_fp32.testing.cpu import model_parallel, single_process

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
@click.option("--repeats", default=20, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path))
def main(tokens: tuple[int, ...], repeats: int, json_path: Path | None) -> None:
    rows = []
    with single_process("nccl"), model_parallel():
        for spec in ("transformer_engine", "local"):
            layers = {name: build(spec, keep) for name, keep in (("stock", False), ("fp32", True))}
            for count in tokens:
                times = dict(zip(layers, measure(list(layers.values()), count, repeats), strict=True))
                rows.append({"spec": spec, "tokens": count, **times, "ratio": times["fp32"] / times["stock"]})
                print(
                    f"{spec:20} {count:6} tokens  stock {times['stock']:7.3f} ms  fp32 {times['fp32']:7.3f} ms  "
                    f"{rows[-1]['ratio']:.3f}x"
                )
    if json_path is not None:
        machine = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        }
        json_path.write_text(json.dumps({"command": " ".join(sys.argv), **machine, "rows": rows}, indent=1) + "\n")


def build(spec: str, keep: bool) -> torch.nn.Module:
    """One gated-delta-net layer in bf16, wrapped as Float16Module would."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.spec_utils import build_module

    config = transformer_config(
        MODEL, bf16=True, params_dtype=torch.bfloat16, transformer_impl=spec, persist_layer_norm=False
    )
    fp32 = Fp32Config() if keep else Fp32Config(gated_delta_net=())
    attention = gated_delta_net_block_spec(config, fp32).layer_specs[0].submodules.self_attention
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return build_module(attention, config=config, layer_number=1, pg_collection=groups).cuda().bfloat16()


def measure(layers: list[torch.nn.Module], tokens: int, repeats: int) -> list[float]:
    """Median ms of forward and backward of each layer; the layers take turns."""
    hidden = torch.randn(tokens, 1, MODEL.hidden_size, device="cuda").bfloat16().requires_grad_()
    cotangent = torch.randn_like(hidden)
    times: list[list[float]] = [[] for _ in layers]
    for turn in range(repeats + 3):
        for layer, taken in zip(layers, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            layer(hidden, None)[0].backward(cotangent)
            end.record()
            end.synchronize()
            if turn >= 3:
                taken.append(start.elapsed_time(end))
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
