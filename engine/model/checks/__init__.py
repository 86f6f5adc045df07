"""Checks of the input models: whether they are models, in which format, and why two of them don't match."""
