"""Formats of quantized tensors, as functions from stored parts to values."""
