"""Hugging Face tensors of a model that is being trained, one unit at a time, for an inference engine or a directory."""

from megatron_fp32.streaming.ranks import StreamError
from megatron_fp32.streaming.sglang import SGLangOptions, SGLangSink
from megatron_fp32.streaming.sinks import EngineReceipt, HuggingFaceDirectory, Sink, Upload
from megatron_fp32.streaming.streamer import Receipt, WeightStreamer
from megatron_fp32.streaming.vllm import VllmOptions, VllmSink
from megatron_fp32.streaming.vllm_source import VllmWeightSource

__all__ = [
    "EngineReceipt",
    "HuggingFaceDirectory",
    "Receipt",
    "SGLangOptions",
    "SGLangSink",
    "Sink",
    "StreamError",
    "Upload",
    "VllmOptions",
    "VllmSink",
    "VllmWeightSource",
    "WeightStreamer",
]
