"""Model families (no Megatron import) and the specs and providers that build them (Megatron)."""
