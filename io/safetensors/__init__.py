"""Checkpoints in the safetensors format: headers, dtypes, tensors, identity."""
