"""Quantized models with unusual shapes, lists and layers."""
