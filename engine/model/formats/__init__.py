"""Finds the values of tensors that are quantized, or stored in another order: which stored tensors belong to them."""
