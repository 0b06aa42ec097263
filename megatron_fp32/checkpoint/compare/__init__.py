"""Comparison of two checkpoints, tensor by tensor."""
