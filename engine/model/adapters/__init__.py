"""Adapters: what they change in a model, and the values of a model with adapters."""
