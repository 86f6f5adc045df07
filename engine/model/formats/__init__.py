"""Finds the values of quantized checkpoints: which stored tensors are codes, scales, or belong to them."""
