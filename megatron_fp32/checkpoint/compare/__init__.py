"""Compares two checkpoints, tensor by tensor."""
