"""What tests of `SGLangSink` push, and what a server must hold afterwards."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from megatron_fp32 import SGLangOptions, SGLangSink
from megatron_fp32.streaming import Upload
from megatron_fp32.weights.tensors import info_of

Held = dict[str, tuple[str, tuple[int, ...], str]]
"""Dtype, shape and SHA-256 of tensors by name."""
Tensors = dict[str, Tensor]

CPU = torch.device("cpu")
OPTIONS: dict[str, Any] = {"timeout": 10.0, "bucket_bytes": 200}


def odd(seed: int = 0) -> Tensors:
    """Tensors of sizes that leave the next one unaligned."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for layer in range(6):
        values = torch.randn(13, 7, generator=generator)
        found |= {
            f"{layer}.weight": values.to(torch.float8_e4m3fn),
            f"{layer}.weight_scale_inv": torch.rand(1, 1, generator=generator),
            f"{layer}.codes": values[:3, 0].to(torch.int8),
            f"{layer}.norm": values[0].bfloat16(),
            f"{layer}.scale": values[1, 1].clone(),
            f"{layer}.none": torch.empty(0, 3),
        }
    return found | {"large": torch.randn(400, generator=generator)}


def held(tensors: Tensors) -> Held:
    raw = {n: t.contiguous().flatten().view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}
    return {n: (str(t.dtype), tuple(t.shape), hashlib.sha256(raw[n]).hexdigest()) for n, t in tensors.items()}


def upload(tensors: Tensors, version: int, fp8: Any = None) -> Upload:
    infos = {name: info_of(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    sidecar: Any = None  # not looked at
    return Upload(version=version, tensors=infos, fp8=fp8, sidecar=sidecar, device=CPU)


def push(sink: SGLangSink, tensors: Tensors, version: int, *, stop: int | None = None) -> None:
    """As the streamer does; `stop` is the number of tensors after which something else fails."""
    try:
        sink.begin(upload(tensors, version))
        for at, (name, tensor) in enumerate(tensors.items()):
            if at == stop:
                raise ValueError("a weight is not finite")
            sink.write(name, tensor)
        sink.finish()
    except BaseException as error:
        sink.abort(error)
        raise


def sink_of(url: str, **options: Any) -> SGLangSink:
    return SGLangSink(url, options=SGLangOptions(**OPTIONS | options))
