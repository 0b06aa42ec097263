"""Readers and writers of files: safetensors, `torch_dist`, PyTorch's pickles."""
