"""Reductions: sums, counts and selections over a tensor, and what follows from the counts of a pass."""
