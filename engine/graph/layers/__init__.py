"""Adds the layers of an output: those with the tensors of earlier ones at once, prediction layers by their rules."""
