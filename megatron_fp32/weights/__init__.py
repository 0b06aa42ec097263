"""The mapping between Hugging Face tensors and Megatron tensors. Modules here use neither files nor Megatron."""
