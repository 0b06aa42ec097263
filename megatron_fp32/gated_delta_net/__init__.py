"""GatedDeltaNet with fp32 parameters, and a norm that megatron-core's local spec does not have."""
