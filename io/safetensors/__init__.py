"""The safetensors format: the headers of its files."""
