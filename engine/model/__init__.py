"""What a checkpoint contains: layers, roles, modules, quantized tensors."""
