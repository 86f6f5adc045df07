"""Checks of a graph against its models and its recipe, and the warnings that they cause."""
