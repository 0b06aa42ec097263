"""Running megatron-core without a GPU, and on several ranks, in tests."""
