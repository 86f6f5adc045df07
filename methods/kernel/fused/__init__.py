"""Computes expression graphs on the CPU: one generated native loop per pass, from the stored bytes to the stored bytes."""
