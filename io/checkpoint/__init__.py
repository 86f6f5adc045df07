"""Checkpoints: which files belong to a model, their index, and the identity of each file."""
