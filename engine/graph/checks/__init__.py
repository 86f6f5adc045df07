"""Checks of a stage: its layers, slices and filters, and the quantized tensors that it copies."""
