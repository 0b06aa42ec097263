"""The matrix products of the output layer, their gradients, and what ranks exchange for them.

Shared by `ops.logits`, which returns the products, and `ops.logprobs`, which reduces them to a few numbers per token.
"""
