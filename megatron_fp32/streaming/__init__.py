"""Hugging Face tensors of a model that is being trained, one unit at a time, for an inference engine or a directory."""

from megatron_fp32.streaming.ranks import StreamError
from megatron_fp32.streaming.sinks import HuggingFaceDirectory, Sink, Upload
from megatron_fp32.streaming.streamer import Receipt, WeightStreamer

__all__ = ["HuggingFaceDirectory", "Receipt", "Sink", "StreamError", "Upload", "WeightStreamer"]
