"""Describes what single tensors are made of."""
