"""Kept parameters: parameters that stay fp32 when the model around them is cast."""
