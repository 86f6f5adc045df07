"""Models whose tensors have other names."""
