"""Checkpoints and bytes: safetensors headers, reading, writing. Knows nothing of merging."""
