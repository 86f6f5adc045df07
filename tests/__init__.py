"""Tests, and the model helpers that benchmarks share with them."""
