"""Computes expression graphs on the CPU: one native loop per pass, from stored bytes to stored bytes."""
