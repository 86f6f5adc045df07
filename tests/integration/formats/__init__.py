"""Merges of models in quantized formats."""
