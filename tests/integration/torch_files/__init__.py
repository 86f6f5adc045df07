"""Tests of merges whose inputs are PyTorch checkpoint files."""
