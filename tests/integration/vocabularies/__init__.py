"""Merges of models with different vocabularies."""
