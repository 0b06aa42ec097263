"""Megatron models with fp32 layers: layer specs, the model provider, command-line flags."""
