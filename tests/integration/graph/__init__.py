"""Graphs, end to end: stages, and values that are computed from parts."""
