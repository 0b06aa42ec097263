"""Repairs and checks of megatron-core's optimizers, for models with fp32 parameters among 16-bit parameters."""
