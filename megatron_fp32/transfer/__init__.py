"""How weights cross from a trainer's process to a process of an inference engine: no Megatron, no engine."""
