"""Reads a decoder's shapes and arithmetic from a Hugging Face `config.json`, and refuses unsupported models."""
