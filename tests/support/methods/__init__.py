"""Merge methods under test: cases, a tile runner, references in float64."""
