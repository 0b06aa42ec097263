"""Which weights an FP8 checkpoint quantizes, and under which names."""
