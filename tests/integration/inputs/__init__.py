"""Merges of checkpoints in the forms that people have: single files, fused experts."""
