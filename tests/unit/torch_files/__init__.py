"""Tests of the reader of PyTorch checkpoint files."""
