"""Derives the config.json of an output: comparison of the inputs, unknown rules, and keys that follow the tensors."""
