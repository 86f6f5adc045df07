"""Accesses to the parts of values: which elements a range needs, and in which order."""
