"""Tests of the formats of quantized checkpoints: which tensors are found, and what is refused."""
