"""Measures the computation alone: the compute lane of a merge, and the loops that decode."""
