"""How Hugging Face's tensors and Megatron's are the same weights: no files, no Megatron."""
