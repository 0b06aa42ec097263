"""The output layer with fp32 logits, and losses and log-probs without stored logits."""
