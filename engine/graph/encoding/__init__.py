"""Nodes that store values in quantized formats, as codes and scales."""
