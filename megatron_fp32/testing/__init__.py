"""Helpers for tests that run megatron-core without a GPU, or on several ranks."""
