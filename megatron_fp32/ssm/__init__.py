"""Linear-attention layers."""
