"""The output layer with fp32 logits, and losses and log-probs that it computes without storing logits."""
