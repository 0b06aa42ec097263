"""Checkpoint formats and the conversion between them. Nothing here imports Megatron."""
