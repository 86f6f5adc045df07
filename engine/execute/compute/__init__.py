"""Computes chunks: the rules that hold for every backend, and the backends."""
