"""What megatron-core's optimizers need for parameters that are fp32 in the model."""
