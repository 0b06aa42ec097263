"""Numerics on plain tensors and explicit process groups. Nothing here imports Megatron."""
