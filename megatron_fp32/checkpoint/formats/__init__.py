"""Readers and writers of checkpoint files: safetensors, `torch_dist` and pickles of `torch.save`."""
