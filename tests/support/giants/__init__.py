"""Tiny models with the layouts of published giants: their classes, names, formats, and prediction layers."""
