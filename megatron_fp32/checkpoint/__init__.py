"""Conversion, quantization, comparison and inspection of checkpoints. Modules here do not import Megatron."""
