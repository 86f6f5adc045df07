"""Entries of a stage with a syntax of their own."""
