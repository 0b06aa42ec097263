"""GatedDeltaNet with fp32 parameters, and the norm that megatron-core's local spec lacks."""
